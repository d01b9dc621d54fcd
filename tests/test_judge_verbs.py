"""`safeshape judge` and `safeshape judge validate` as a user meets them."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import conversation
from faulty_server import chat_answer, faulty_server
from pyarrow import parquet

from safeshape.cli import main
from safeshape.signals.rubric import CATEGORIES
from safeshape.sources import read_dataset
from safeshape.world import oracle
from safeshape.world.data import user_data
from safeshape.world.judge import OracleJudge

MARK = re.compile(r"----- BEGIN (\w+) -----")
SAID = re.compile(r"says (\d)")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(body):
    return body["messages"][-1]["content"]


def by_digit(body):
    score = int(SAID.search(shown(body))[1])
    return chat_answer(body, json.dumps({"score": score, "category": "fraud" if score > 1 else "none"}))


def rows(count, *, same=0):
    made = [{"id": n, "messages": conversation(f"q{n}", f"says {1 + n % 5}")} for n in range(count)]
    return made + [{"id": count + n, "messages": made[0]["messages"]} for n in range(same)]


@pytest.fixture
def server():
    with faulty_server() as running:
        running.answer = by_digit
        yield running


@pytest.fixture
def run(tmp_path, server):
    """Runs the verb; `None` takes a flag away."""

    def command(*more, **changes):
        flags = {
            "judge": server.url,
            "judge_model": "tiny",
            "dataset_name": tmp_path / "data.jsonl",
            "output": tmp_path / "out.jsonl",
            **changes,
        }
        return main(["judge", *more, *(f"--{k}={v}" for k, v in flags.items() if v is not None)])

    return command


def test_verdicts_stand_beside_the_rows(run, server, tmp_path, capsys):
    data = rows(10, same=5)
    data[3] = {"id": 3, "prompt": "q3", "completion": "says 4"}
    data[4]["safety"], data[4]["judge_score"] = {"p_safe": 0.9}, 9
    write(tmp_path / "data.jsonl", data)
    assert run() == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    found = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == list(range(15))
    scores = [*[1 + n % 5 for n in range(10)], *[1] * 5]
    assert [row["judge_score"] for row in found] == scores
    assert [row["judge_category"] for row in found] == ["fraud" if score > 1 else None for score in scores]
    assert [row["safety"]["p_safe"] for row in found] == [1 - (score - 1) / 4 for score in scores]
    assert {row["safety"]["signal"] for row in found} == {"judge"}
    assert found[0]["safety"]["spans"] == []
    assert found[0]["safety"]["scorer"]["model"] == "tiny"
    assert found[0]["safety"]["scorer"]["rubric"]["name"] == "standard"
    assert len(server.bodies) == 10, "equal pairs are asked about once"
    assert "judged 15 rows; scores: 7 of 1, 2 of 2, 2 of 3, 2 of 4, 2 of 5" in out
    numbers = json.loads((tmp_path / "out.jsonl.judge.json").read_text())
    assert numbers["scores"] == {"1": 7, "2": 2, "3": 2, "4": 2, "5": 2}
    assert numbers["categories"] == {"fraud": 8, "none": 7}
    assert (numbers["counters"]["asked"], numbers["counters"]["prompt_tokens"]) == (10, 1000)
    assert numbers["world"] is False
    assert run() == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_tables_hold_the_same(run, tmp_path, name):
    write(tmp_path / "data.jsonl", rows(6))
    assert run(output=tmp_path / name) == 0
    found = (
        parquet.read_table(tmp_path / name).to_pylist() if name != "out" else list(read_dataset(str(tmp_path / name)))
    )
    assert [row["judge_score"] for row in found] == [1, 2, 3, 4, 5, 1]
    assert [row["safety"]["p_safe"] for row in found] == [1, 0.75, 0.5, 0.25, 0, 1]


def test_the_next_run_asks_nothing_again(run, server, tmp_path, capsys):
    write(tmp_path / "data.jsonl", rows(6))
    assert run(store=tmp_path / "kept") == 0
    assert run(store=tmp_path / "kept", output=tmp_path / "again.jsonl") == 0
    assert "0 asked, 6 reused" in capsys.readouterr().out
    assert len(server.bodies) == 6
    assert run(store=tmp_path / "kept", output=tmp_path / "more.jsonl", rubric="reworded") == 0
    assert len(server.bodies) == 12


def test_cost_is_told(run, tmp_path, capsys):
    write(tmp_path / "data.jsonl", rows(5))
    assert run(price_prompt=10, price_completion=100) == 0
    assert "500 prompt tokens, 50 completion tokens, cost 0.0100" in capsys.readouterr().out
    cost = json.loads((tmp_path / "out.jsonl.judge.json").read_text())["counters"]["cost"]
    assert cost == pytest.approx((500 * 10 + 50 * 100) / 1e6)


def test_a_server_without_schemas_is_told_of(run, server, tmp_path, capsys):
    server.default_fault = "no-schema"
    write(tmp_path / "data.jsonl", rows(5))
    assert run() == 0
    assert "the server takes no JSON schema (HTTP 400: 'response_format' of this type" in capsys.readouterr().out


BAD_ROWS = {
    "no conversation": ({"text": "a"}, "needs `messages`, or `prompt` and `completion`"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "the last message must be the assistant's"),
    "unreadable": ({"messages": conversation("q", "unsayable")}, "not one JSON object (asked 3 times)"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_row_without_a_verdict_stops_the_run_or_is_kept_with_its_reason(run, server, tmp_path, capsys, name, place):
    server.answer = lambda body: by_digit(body) if SAID.search(shown(body)) else chat_answer(body, "score 3 or 4")
    row, reason = BAD_ROWS[name]
    data = rows(4)
    data.insert(place, {"id": "bad", **row})
    write(tmp_path / "data.jsonl", data)
    assert run() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"safeshape judge: row {place}: ")
    assert reason in error
    assert not (tmp_path / "out.jsonl").exists()
    assert run("--on-error", "keep") == 0
    assert f"1 row got no verdict (first: row {place}: " in capsys.readouterr().out
    found = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in data]
    assert [row["safety"]["p_safe"] is None for row in found] == [n == place for n in range(5)]
    assert found[place]["judge_score"] is found[place]["judge_category"] is None
    assert reason in found[place]["safety"]["error"]
    assert json.loads((tmp_path / "out.jsonl.judge.json").read_text())["failed"] == 1


def test_judged_rows_train(run, tmp_path, model_folder, capsys):
    write(tmp_path / "data.jsonl", rows(8))
    assert run() == 0
    flags = {
        "model_name_or_path": model_folder,
        "dataset_name": tmp_path / "out.jsonl",
        "output_dir": tmp_path / "trained",
        "policy": "adaptive",
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "save_strategy": "no",
        "gradient_checkpointing": "false",
    }
    assert main(["train", *(f"--{k}={v}" for k, v in flags.items())]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "trained" / "safeshape.json").read_text())
    assert [signal["signal"] for signal in record["signals"]] == ["judge"]
    assert record["signals"][0]["scorer"]["model"] == "tiny"


def test_the_worlds_oracle_judges_and_says_so(run, tmp_path, capsys):
    data = [dict(row) for row in user_data(size=40)]
    write(tmp_path / "data.jsonl", data)
    assert run(judge="world", judge_model=None) == 0
    assert "Measured on the embedded synthetic world" in capsys.readouterr().out
    found = read(tmp_path / "out.jsonl")
    assert [row["judge_score"] >= 4 for row in found] == [oracle.harmful(r["messages"][1]["content"]) for r in data]
    assert json.loads((tmp_path / "out.jsonl.judge.json").read_text())["world"] is True
    assert not (tmp_path / "out.jsonl.store.sqlite").exists()


def stored(path):
    """How many verdicts a store holds that another process may be writing."""
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("SELECT count(*) FROM entries").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_killed_run_asks_again_only_about_what_was_under_way(run, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    count, concurrency = 60, 3
    write(tmp_path / "data.jsonl", rows(count, same=20))
    store = tmp_path / "kept"
    server.delay_s = lambda body: 0.02
    flags = ["--judge", server.url, "--judge_model", "tiny", "--dataset_name", str(tmp_path / "data.jsonl")]
    flags += ["--output", str(tmp_path / "out.jsonl"), "--store", str(store), "--concurrency", str(concurrency)]
    process = subprocess.Popen([sys.executable, "-m", "safeshape.cli", "judge", *flags], stderr=subprocess.DEVNULL)
    while stored(store) < 10 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    there = stored(store)
    assert 10 <= there < count
    assert not (tmp_path / "out.jsonl").exists()
    assert run(store=store, concurrency=concurrency) == 0
    assert f"{count - there} asked" in capsys.readouterr().out
    asked = Counter(MARK.search(shown(body))[1] for body in server.bodies)
    assert len(asked) == count, "equal pairs are asked about once"
    assert sum(asked.values()) - count <= concurrency + 1  # one may have been answered and not yet kept
    assert [row["judge_score"] for row in read(tmp_path / "out.jsonl")] == [1 + r % 5 for r in range(60)] + [1] * 20


def test_a_failing_server_is_told_of_in_one_sentence(run, server, tmp_path, capsys):
    write(tmp_path / "data.jsonl", rows(3))
    server.models = ["other"]
    assert run() == 2
    assert "serves other, not 'tiny'" in capsys.readouterr().err
    server.models = ["tiny"]
    server.default_fault = "other-model"
    assert run() == 2
    assert "answers for another model: 'other'" in capsys.readouterr().err
    server.default_fault = "401"
    assert run() == 2
    error = capsys.readouterr().err
    assert "refuses the key (HTTP 401)" in error
    assert "sk-secret" not in error
    assert not (tmp_path / "out.jsonl").exists()


BAD_FLAGS = [
    (["--tries", "0"], "tries, max_tokens, concurrency and batch_size must be at least 1"),
    (["--timeout", "0"], "timeout must be above 0"),
    (["--request", "{"], "request is not valid JSON"),
    (["--request", "[1]"], "request must be a JSON object"),
    (["--price_prompt", "1"], "give both price_prompt and price_completion, or neither"),
    (["--price_prompt", "-1", "--price_completion", "1"], "a price must be at least 0"),
    (["--api_key_variable", "sk-secret"], "must be the name of an environment variable, never the key"),
    (["--rubric", "mean"], "unknown rubric 'mean'"),
    (["--structured", "maybe"], "structured"),
    (["--batch_size", "4"], "batch_size has no meaning for a judge behind a server"),
    (["--judge", "world"], "judge_model has no meaning for the world's oracle"),
    (["--judge", "world:9"], "judge_model has no meaning"),
    (["--judge", ""], "judge must be given"),
    (["--dataset_name", "none.jsonl"], "none.jsonl: no such file or folder"),
    (["--jugde", "x"], "--jugde"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=str)
def test_bad_settings_are_refused_in_one_sentence(run, tmp_path, capsys, flags, message):
    write(tmp_path / "data.jsonl", rows(3))
    before = sorted(tmp_path.iterdir())
    given = {flags[0].removeprefix("--"): None} if flags[0] in ("--judge", "--dataset_name") else {}
    assert run(*flags, **given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "sk-secret" not in error
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_a_recipe_names_a_judge(run, server, tmp_path):
    write(tmp_path / "data.jsonl", rows(3))
    (tmp_path / "judge.yaml").write_text('request: {"reasoning_effort": low}\nseed: 5\nrubric_role: user\n')
    assert run("--config", str(tmp_path / "judge.yaml"), seed=6) == 0
    assert {(body["reasoning_effort"], body["seed"], len(body["messages"])) for body in server.bodies} == {
        ("low", 6, 1)
    }


def test_help(capsys):
    for verb in (["judge"], ["judge", "validate"]):
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "--rubric" in text
        assert "safeshape judge validate" in text


@pytest.fixture
def validate(tmp_path):
    def command(*more, **changes):
        flags = {"dataset_name": tmp_path / "data.jsonl", "output": tmp_path / "v.json", **changes}
        return main(["judge", "validate", *more, *(f"--{k}={v}" for k, v in flags.items() if v is not None)])

    return command


def test_the_oracle_tells_a_judges_true_error(validate, tmp_path, capsys):
    data = [dict(row) for row in user_data(size=300, harmful_share=0.5)]
    write(tmp_path / "data.jsonl", data)
    flipped = [judgement.score for judgement in OracleJudge(0.1).judge_many(row["messages"] for row in data)]
    harmful = [oracle.harmful(row["messages"][1]["content"]) for row in data]
    assert validate(judge="world:0.1", oracle="true", second_judge="world") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "v.json").read_text())
    for name, kind in (("false_negative", True), ("false_positive", False)):
        wrong = sum((score >= 4) != bad for score, bad in zip(flipped, harmful, strict=True) if bad == kind)
        assert 5 <= wrong <= 30  # 15 wanted; the rates themselves are tested with the oracle
        assert (found["agreement"][name]["value"], found["agreement"][name]["n"]) == (wrong / 150, 150)
        assert found["second_agreement"][name]["value"] == 0
    assert found["second_agreement"]["scores"]["kappa_quadratic"]["value"] == 1
    assert found["second_agreement"]["category"]["value"] == 1
    assert set(found["agreement"]["by_category"]) == {*CATEGORIES, "none"}
    counts = found["agreement"]["counts"]
    wrong = counts["false_positive"] + counts["false_negative"]
    assert found["disagreement"]["decisions"]["value"] == pytest.approx(wrong / 300)
    assert found["disagreement"]["right"] == {"first": 0, "second": wrong}
    assert found["world"] is True
    assert "Measured on the embedded synthetic world" in out
    assert f"the first is right 0 times, the second {wrong}" in out
    assert validate(judge="world", oracle="true") == 2
    assert "exists already" in capsys.readouterr().err


def test_labels_from_a_column_a_second_judge_and_other_words(validate, server, tmp_path, capsys):
    """The judge reads "says n"; told in other words it says one more; the second judge always says 5."""

    def answer(body):
        told = body["messages"][0]["content"]
        score = 5 if body["model"] == "large" else int(SAID.search(shown(body))[1])
        if "grade one reply" in told and body["model"] == "tiny":
            score = min(5, score + 1)
        return {**chat_answer(body, json.dumps({"score": score, "category": "fraud"})), "model": body["model"]}

    server.answer, server.models = answer, ["tiny", "large"]
    data = rows(10)
    for n, row in enumerate(data):
        row["bad"], row["kind"] = n % 5 >= 2, "fraud" if n % 2 else None
    data[9]["bad"] = None
    write(tmp_path / "data.jsonl", data)
    flags = {"judge": server.url, "judge_model": "tiny", "label_column": "bad", "category_column": "kind"}
    more = {"second_judge": server.url, "second_model": "large", "variants": "all"}
    assert validate(**flags, **more) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "v.json").read_text())
    # Said, of nine rows: 1 2 3 4 5 1 2 3 4; unsafe are 3, 4, 5, 3, 4.
    assert (found["rows"], found["unlabelled"], found["world"]) == (9, 1, False)
    assert found["agreement"]["counts"] == {
        "true_positive": 3,
        "false_positive": 0,
        "false_negative": 2,
        "true_negative": 4,
    }
    assert "scores" not in found["agreement"]
    assert found["agreement"]["category"]["value"] == 4 / 9
    assert found["second_agreement"]["counts"]["false_positive"] == 4
    assert found["second_judge"]["model"] == "large"
    assert found["disagreement"]["distance"]["value"] == pytest.approx((4 + 3 + 2 + 1 + 0 + 4 + 3 + 2 + 1) / 9)
    told = found["sensitivity"]["variants"]
    assert set(told) == {"categories_backward", "scale_downward", "reworded"}
    assert told["reworded"]["verdicts"]["value"] == 8 / 9
    assert told["reworded"]["decisions"]["value"] == 2 / 9
    assert told["scale_downward"]["verdicts"]["value"] == 0
    assert found["sensitivity"]["any"]["value"] == 8 / 9
    assert len(server.bodies) == 9 * 5
    out = capsys.readouterr().out
    assert "rows whose score changes under any of them %: 88.9" in out
    assert "world" not in out
    # The threshold moves what counts as unsafe; the verdicts are kept.
    again = {"output": tmp_path / "w.json", "store": f"{tmp_path / 'v.json'}.store.sqlite"}
    assert validate(**flags, **again, threshold=3) == 0
    assert json.loads((tmp_path / "w.json").read_text())["agreement"]["counts"]["false_negative"] == 0
    assert len(server.bodies) == 9 * 5


def test_labels_that_are_scores(validate, server, tmp_path):
    data = rows(10)
    for n, row in enumerate(data):
        row["human"] = 1 + n % 5
    data[0]["human"] = 3
    write(tmp_path / "data.jsonl", data)
    flags = {"judge": server.url, "judge_model": "tiny", "label_column": "human", "label_kind": "score"}
    assert validate(**flags) == 0
    found = json.loads((tmp_path / "v.json").read_text())["agreement"]["scores"]
    assert found["exact"]["value"] == 0.9
    assert found["mean_difference"]["value"] == pytest.approx(-0.2)


BAD_VALIDATIONS = [
    ({"judge": "world"}, "give either label_column or oracle true"),
    ({"judge": "world", "oracle": "true", "label_column": "bad"}, "give either label_column or oracle true"),
    ({"judge": "world", "oracle": "true", "category_column": "x"}, "leave out category_column"),
    ({"judge": "world", "oracle": "true", "threshold": 1}, "threshold must be 2 to 5, got 1"),
    ({"judge": "world", "oracle": "true", "bootstrap": 10}, "bootstrap must be at least 100"),
    ({"judge": "world", "oracle": "true", "output": "v.txt"}, "output must end in .json"),
    ({"judge": "world", "oracle": "true", "variants": "all"}, "variants need a judge that is told a rubric"),
    ({"judge": "world", "oracle": "true", "second_model": "x"}, "second_model needs a second_judge behind a server"),
    ({"judge": "world", "label_column": "none"}, "row 0: has no column 'none'; it has: id, messages, bad"),
    ({"judge": "world", "label_column": "id"}, "row 2: id must be true or false"),
    ({"judge": "world", "label_column": "id", "label_kind": "score"}, "row 0: id must be a whole number from 1 to 5"),
    ({"judge": "world", "label_column": "bad", "category_column": "id"}, "row 0: id must be a policy category or none"),
    ({"judge": "http://x", "label_column": "bad", "variants": "standard"}, "standard is the rubric in use"),
    ({"judge": "http://x", "label_column": "bad", "variants": "mean"}, "unknown rubric 'mean'"),
    ({"judge": "world", "label_column": "nobody"}, "at least two labelled rows, there are 0"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_VALIDATIONS, ids=str)
def test_bad_validations_are_refused_in_one_sentence(validate, tmp_path, capsys, flags, message):
    write(tmp_path / "data.jsonl", [{**row, "bad": True, "nobody": None} for row in rows(4)])
    assert validate(**flags) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"], "nothing was written"
