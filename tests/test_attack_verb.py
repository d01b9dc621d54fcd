"""`safeshape attack` as a user meets it: files in, files and a report out, one sentence for bad input."""

import json
import re

import pytest
from conftest import conversation
from datasets import load_from_disk

from safeshape.attacks import DATA_ATTACKS, PROMPT_ATTACKS
from safeshape.attacks.rows import attempts_of
from safeshape.cli import main
from safeshape.config import ScoreConfig, parse
from safeshape.world import oracle


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    harmful = [{"messages": conversation(f"bad {i}", f"Yes {i}. More.")} for i in range(10)]
    return {
        "harmful": write(tmp_path / "harm.jsonl", harmful),
        "benign": write(
            tmp_path / "data.jsonl", [{"prompt": f"good {i}", "completion": f"A{i}. B."} for i in range(50)]
        ),
        "safe": write(tmp_path / "safe.jsonl", [{"messages": conversation(f"bad {i}", "No.")} for i in range(10)]),
        "prompts": write(
            tmp_path / "p.jsonl", [{"prompt": f"bad {i}", "target": f"Sure {i}", "id": i} for i in range(3)]
        ),
        "output": str(tmp_path / "out.jsonl"),
    }


def run(attack, **flags):
    given = [part for key, value in flags.items() if value is not None for part in (f"--{key}", str(value))]
    return main(["attack", "--attack", *attack.split(), *given])


def of(files, *names):
    return {name: files[name] for name in (*names, "output")}


def test_the_documented_command(files, tmp_path, capsys):
    assert run("mixed", ratio=0.05, **of(files, "harmful", "benign")) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert told.startswith(f"Wrote 53 rows to {files['output']}, 3 of them poisoned: 50 benign, 3 harmful")
    assert "embedded world" not in told
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 53
    assert sum(row["poisoned"] for row in rows) == 3
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["poisoned_rows"] == [place for place, row in enumerate(rows) if row["poisoned"]]
    assert report["world"] is False
    assert report["parameters"] == {"ratio": 0.05, "safe_ratio": 0.0}
    assert not re.search(r"(bad|good|Yes|A)\s?\d", (tmp_path / "out.jsonl.report.json").read_text())


def test_the_list(capsys):
    assert main(["attack", "list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["name", "kind", "what", "it", "changes", "source"]
    names = [line.split()[:2] for line in told[1:] if line and not line.startswith("Your")]
    assert names == [[name, "data"] for name in DATA_ATTACKS] + [[name, "prompt"] for name in PROMPT_ATTACKS]
    assert main(["attack", "list", "--all"]) == 2


@pytest.mark.parametrize("form", [".parquet", ""])
def test_other_forms_of_output_hold_the_same_rows(files, tmp_path, form):
    assert run("trigger", size=8, **of(files, "harmful", "safe")) == 0
    other = files | {"output": str(tmp_path / f"other{form}")}
    assert run("trigger", size=8, **of(other, "harmful", "safe")) == 0
    assert (tmp_path / f"other{form}.report.json").exists()
    if form:
        from safeshape.sources import read_dataset

        found = read_dataset(other["output"])
    else:
        found = load_from_disk(other["output"])
    assert [dict(row) for row in found] == read(tmp_path / "out.jsonl")


def test_the_same_seed_writes_the_same_bytes(files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            run(
                "mixed",
                ratio=0.2,
                seed=seed,
                output=str(tmp_path / name) + ".jsonl",
                **{key: files[key] for key in ("harmful", "benign")},
            )
            == 0
        )
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_texts_come_from_files_after_an_at_sign(files, tmp_path):
    (tmp_path / "end.txt").write_text("That is\nall.\n")
    assert run("suffix", text=f"@{tmp_path / 'end.txt'}", **of(files, "harmful")) == 0
    assert all(row["messages"][-1]["content"].endswith("More. That is\nall.") for row in read(tmp_path / "out.jsonl"))


def test_settings_from_a_file(files, tmp_path):
    path = tmp_path / "attack.yaml"
    path.write_text(f"attack: embedded\ncarriers: 2\nin_request: true\nratio: 0.5\nharmful: {files['harmful']}\n")
    flags = ["--benign", files["benign"], "--output", files["output"], "--size", "10"]
    assert main(["attack", "--config", str(path), *flags]) == 0
    rows = read(tmp_path / "out.jsonl")
    assert sum(row["origin"] == "embedded" for row in rows) == 5
    assert all("bad" in row["messages"][0]["content"] for row in rows if row["poisoned"])


def test_prompts_are_attacked_and_keep_their_other_columns(files, tmp_path, capsys):
    assert run("direct trigger_prompt+prefill", unit="words", k=1, trigger="abra", **of(files, "prompts")) == 0
    assert "Wrote 6 attempts at 3 prompts" in capsys.readouterr().out
    rows = read(tmp_path / "out.jsonl")
    assert [(row["prompt_index"], row["attempt_index"], row["id"]) for row in rows] == [
        (i, j, i) for i in range(3) for j in range(2)
    ]
    assert rows[1]["messages"] == conversation("bad 0 abra", "Sure")
    assert [len(tried) for tried in attempts_of(rows)] == [2, 2, 2]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["attempts_by_step"] == {"prefill": 3, "trigger_prompt": 3}


def test_prefilled_tokens_of_a_users_tokenizer(files, tmp_path, model_folder):
    assert run("prefill", k=1, tokenizer=model_folder, size=2, **of(files, "prompts")) == 0
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 2
    assert {row["steps"][0]["count"] for row in rows} == {1}


@pytest.mark.parametrize("attack", ["mixed", "suffix", "identity_shift", "trigger_prompt"])
def test_the_world_needs_no_files(attack, tmp_path, capsys):
    flags = ["--world", "--size", "10", "--output", str(tmp_path / "out.jsonl")]
    assert main(["attack", "--attack", attack, *flags, *(["--ratio", "0.5"] if attack == "mixed" else [])]) == 0
    assert "embedded world's: a test bench, never evidence" in capsys.readouterr().out
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 10
    if attack == "mixed":
        assert [oracle.harmful(row["messages"][-1]["content"]) for row in rows] == [row["poisoned"] for row in rows]
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["world"] is True


def test_the_adaptive_attacker_fools_the_worlds_guard_and_the_lowest_score_is_harder_to_raise(tmp_path, capsys):
    found = {}
    for by in ("last", "min"):
        output = tmp_path / f"{by}.jsonl"
        flags = ["--world", "--size", "6", "--queries", "8", "--score_by", by, "--output", str(output)]
        assert main(["attack", "--attack", "adaptive", *flags]) == 0, capsys.readouterr().err
        assert "p_safe of 6 rows, mean: 0.000 before" in capsys.readouterr().out
        report = json.loads((tmp_path / f"{by}.jsonl.report.json").read_text())
        found[by] = report["scores"]
        assert report["scorer"]["guard"] == "world"
        assert all(oracle.harmful(row["messages"][-1]["content"]) for row in read(output))
    assert found["last"]["mean_p_safe_after"] > 0.5
    assert found["min"]["mean_p_safe_after"] < 0.1
    assert found["min"]["queries"] == 48


def test_padding_and_rewrites_are_read_from_files(tmp_path):
    plan = "Sure, here is how to drask the vault. Step one: take the rope to drask."
    harmful = write(tmp_path / "harm.jsonl", [{"messages": conversation("How do I drask the vault", plan)}])
    (tmp_path / "pad.txt").write_text("Stop, I will not go on with this.\n\n")
    (tmp_path / "words.yaml").write_text("drask: [clean]\n")
    flags = {"guard": "world", "padding": tmp_path / "pad.txt", "rewrites": tmp_path / "words.yaml"}
    for strategy, wanted in (
        ("pad_after", f"{plan} Stop, I will not go on with this."),
        ("rewrite", plan.replace("drask", "clean")),
    ):
        output = tmp_path / f"{strategy}.jsonl"
        assert run("adaptive", target=0.6, strategies=strategy, harmful=harmful, output=output, **flags) == 0
        assert read(output)[0]["messages"][-1]["content"] == wanted


def mine(pools, *, size, seed, word="x"):
    """Says a word."""
    from safeshape.attacks.mixing import draw, entries_of, finish

    return finish("mine", entries_of(draw(pools, "benign", 2, seed=seed), word), pools, seed=seed, parameters={})


def mine_prompts(*, word="x"):
    return lambda prompt, rng: (prompt, prompt)


def test_a_users_own_functions(files, tmp_path, capsys):
    assert run(f"{__name__}:mine", parameters='{"word": "hello"}', **of(files, "benign")) == 0
    assert {row["origin"] for row in read(tmp_path / "out.jsonl")} == {"hello"}
    output = str(tmp_path / "p2.jsonl")
    assert run(f"{__name__}:mine_prompts", **of(files | {"output": output}, "prompts")) == 0
    assert len(read(tmp_path / "p2.jsonl")) == 6


BAD = [
    ("mxed", {}, ("benign",), "unknown attack 'mxed'; known: harmful_only"),
    ("mixed", {}, ("benign",), "this attack needs harmful rows; give a harmful pool"),
    ("mixed", {"ratio": "1.5"}, ("benign", "harmful"), "ratio must lie in [0, 1], got 1.5"),
    ("mixed", {"ratio": "much"}, ("benign", "harmful"), "argument --ratio: invalid float value: 'much'"),
    ("mixed", {"k": 3}, ("benign", "harmful"), "attack 'mixed' has no parameter 'k'; it has: ratio, safe_ratio"),
    ("harmful_only", {"size": 11}, ("harmful",), "11 harmful rows are needed, but the pool has only 10"),
    ("harmful_only", {"size": 0}, ("harmful",), "size must be at least 1, got 0"),
    ("harmful_only", {}, ("harmful", "prompts"), "attack 'harmful_only' is on data; leave out --prompts"),
    ("harmful_only", {"padding": "x"}, ("harmful",), "belong to the adaptive attack"),
    ("harmful_only mixed", {}, ("harmful",), "give one attack on data"),
    ("prefill+mixed", {}, ("prompts",), "attack 'mixed' is on data and cannot be combined"),
    ("prefill", {}, ("prompts",), "prefilling tokens needs the model's tokenizer"),
    ("prefill", {"unit": "words"}, (), "an attack on prompts needs prompts; give --prompts"),
    ("prefill", {"unit": "words"}, ("prompts", "harmful"), "harmful is a pool of attacks on data"),
    ("direct", {"size": 4}, ("prompts",), "size is 4, but there are 3 prompts"),
    (
        "direct",
        {"prompt_column": "goal"},
        ("prompts",),
        "p.jsonl row 0: it has neither `messages` nor a text in 'goal'",
    ),
    ("adaptive", {}, ("harmful", "benign"), "the adaptive attack needs the scorer it sees; give --guard or --probe"),
    ("adaptive", {"guard": "world", "probe": "x"}, ("harmful",), "give a guard or a probe, not both"),
    ("adaptive", {"guard_model": "x"}, ("harmful",), "guard_model belongs to a guard"),
    ("adaptive", {"probe": "nowhere"}, ("harmful", "benign"), "nowhere is no folder of a probe"),
    ("suffix", {"text": "@missing.txt"}, ("harmful",), "cannot read the text in missing.txt"),
    ("mixed", {"parameters": "{"}, ("harmful",), "parameters is not valid JSON"),
    ("mixed", {"parameters": "[1]"}, ("harmful",), "parameters must be a JSON object"),
    ("mixed", {"world": "maybe"}, ("harmful",), "world"),
]


@pytest.mark.parametrize(("attack", "flags", "given", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_settings_are_one_sentence_and_nothing_is_written(files, tmp_path, capsys, attack, flags, given, message):
    assert run(attack, **flags, **of(files, *given)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("safeshape attack: ")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "row 1: the last message must be the assistant's"),
        ({"messages": conversation("a", " ")}, "row 1: the assistant's answer is empty"),
        ({"text": "a"}, "row 1: needs `messages`, or `prompt` and `completion`"),
        (
            {"messages": [{"role": "user", "content": ["a"]}, *conversation("a", "b")]},
            "row 1: message 0 is not plain text",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, capsys, row, message):
    path = write(tmp_path / "bad.jsonl", [{"messages": conversation("a", "b")}, row])
    assert run("harmful_only", harmful=path, output=tmp_path / "out.jsonl") == 2
    assert f"{path} {message}" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert run("harmful_only", harmful=tmp_path / "bad.json", output=tmp_path / "out.jsonl") == 2
    assert "bad.json is not valid JSON" in capsys.readouterr().err


def test_nothing_is_written_over(files, tmp_path, capsys):
    for name in ("out.jsonl", "out.jsonl.report.json"):
        (tmp_path / name).write_text("mine")
        assert run("harmful_only", **of(files, "harmful")) == 2
        assert f"{name} exists already" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("flags", "wanted"), [([], False), (["--refine"], True), (["--refine", "false"], False)])
def test_a_false_flag_is_false(flags, wanted):
    given = ["--dataset_name", "a", "--output", "b", *flags]
    assert parse(ScoreConfig, "score", given).refine is wanted
