"""Critics named in a command: fitted, asked, kept and trained with, and refused in one sentence."""

import json
from pathlib import Path

import pytest
from conftest import conversation
from faulty_server import faulty_server

from safeshape.cli import main
from safeshape.signals.probes import Probe
from safeshape.store import Store
from safeshape.train.critic import prompts_of

ROOT = Path(__file__).parent.parent
ANSWERS = {"two three": 1, "four five six": 5, "seven": 3, "eight nine": 4}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def command(tmp_path, model_folder):
    """A training command on four rows without scores; tests name the critic."""
    rows = [{"messages": conversation(f"fox {i}", answer)} for i, answer in enumerate(ANSWERS)]
    flags = {
        "model_name_or_path": str(model_folder),
        "dataset_name": write(tmp_path / "data.jsonl", rows),
        "output_dir": str(tmp_path / "out"),
        "max_steps": "1",
        "per_device_train_batch_size": "4",
        "logging_steps": "1",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "gradient_checkpointing": "false",
        "use_cpu": "true",
        "policy": '{"name": "adaptive", "scope": "batch"}',
    }

    def arguments(**changes):
        merged = {**flags, **changes}
        return ["train", *(part for k, v in merged.items() if v is not None for part in (f"--{k}", *str(v).split("+")))]

    return arguments


@pytest.fixture
def server():
    """A chat server that scores by the answer it is shown; `silent` answers get nothing that can be read."""
    with faulty_server() as running:
        running.models, running.silent = ["tiny"], set()

        def answer(body):
            shown = body["messages"][-1]["content"]
            score = next((score for text, score in ANSWERS.items() if text in shown), 2)
            known = not any(text in shown for text in running.silent)
            text = json.dumps({"category": "none", "score": score}) if known else "I would rather not say."
            message = {"role": "assistant", "content": text}
            return {
                "object": "chat.completion",
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
            }

        running.answer = answer
        yield running


def record(folder):
    return json.loads((folder / "safeshape.json").read_text())


def first_log(folder):
    return json.loads((folder / "train_results.json").read_text())["log"][0]


def asked(server):
    """How often each answer was shown."""
    shown = [body["messages"][-1]["content"] for body in server.bodies]
    return {text: sum(text in one for one in shown) for text in ANSWERS}


def test_a_judge_behind_a_server_rates_every_pair_once(command, tmp_path, server):
    """Risks 0, 1, 0.5 and 0.75 by the judge: their mean 0.5625 makes beta 0.1 + 0.8 * 0.5625 = 0.55."""
    judge = {"judge": server.url, "judge_model": "tiny", "judge_mode": "pair"}
    assert main(command(**judge, max_steps="3")) == 0
    assert asked(server) == dict.fromkeys(ANSWERS, 1)
    assert first_log(tmp_path / "out")["kl_weight"] == pytest.approx(0.55, abs=1e-6)
    found = record(tmp_path / "out")
    assert [(s["signal"], s["scorer"]["model"], s["rows"]) for s in found["signals"]] == [("judge", "tiny", 4)]
    assert {k: found["critic"][k] for k in ("rows", "scored", "reused", "left_out")} == {
        "rows": 4,
        "scored": 4,
        "reused": 0,
        "left_out": 0,
    }
    assert found["critic"]["judge"]["requests"] == 4
    # Beside the output folder, so that nothing of it is uploaded; another run with it asks nothing.
    assert (tmp_path / "out.store.sqlite").exists()
    kept = {"store": str(tmp_path / "out.store.sqlite"), "output_dir": str(tmp_path / "again")}
    assert main(command(**judge, **kept)) == 0
    assert asked(server) == dict.fromkeys(ANSWERS, 1)
    assert record(tmp_path / "again")["critic"]["reused"] == 4


def test_the_released_ramp_from_scores_of_a_judge(command, tmp_path, server):
    """Scores 1, 5, 3, 4: beta .1, .9, 1/3, 2/3 per example, weighted by the tokens of each answer."""
    policy = '{"name": "adaptive", "ramp": "clamp"}'
    assert main(command(judge=server.url, judge_model="tiny", policy=policy)) == 0
    log = first_log(tmp_path / "out")
    shares = [log[f"risk_hist/{b}"] for b in ("0.0", "0.8", "0.4", "0.6")]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    expected = sum(share * beta for share, beta in zip(shares, (0.1, 0.9, 1 / 3, 2 / 3), strict=True))
    assert log["kl_weight"] == pytest.approx(expected, abs=1e-5)
    assert log["ce_weight"] == pytest.approx(1 - expected, abs=1e-5)


def test_rows_without_a_verdict_are_counted_and_the_others_are_kept(command, tmp_path, server, capsys):
    judge = {"judge": server.url, "judge_model": "tiny", "judge_settings": '{"tries":1}'}
    server.silent = {"seven", "eight nine"}
    assert main(command(**judge)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "2 of 4 rows got no score (first: row 2: " in error
    assert "give --on_error drop" in error
    assert not (tmp_path / "out").exists()
    assert main(command(**judge, on_error="drop")) == 0
    assert asked(server) == {"two three": 1, "four five six": 1, "seven": 2, "eight nine": 2}
    # Scores 1 and 5 are left.
    assert first_log(tmp_path / "out")["kl_weight"] == pytest.approx(0.5, abs=1e-6)
    assert record(tmp_path / "out")["critic"]["left_out"] == 2
    assert record(tmp_path / "out")["data"]["rows"] == 2
    server.silent = set(ANSWERS)
    nothing = {"output_dir": str(tmp_path / "none"), "on_error": "drop", "store": str(tmp_path / "new.sqlite")}
    assert main(command(**judge, **nothing)) == 2
    assert "4 of 4 rows got no score" in capsys.readouterr().err


def test_a_judge_on_policy_behind_a_server(command, tmp_path, server):
    judge = {"judge": server.url, "judge_model": "tiny", "judge_mode": "on_policy"}
    how = {"judge_every": "1", "judge_wait_s": "30", "judge_max_new_tokens": "4", "judge_degradation": "0.5"}
    assert main(command(**judge, **how, max_steps="2")) == 0
    # No answer of a random model is in the table: score 2 everywhere, 2 of the reference: risk 0.25, beta 0.3.
    assert first_log(tmp_path / "out")["kl_weight"] == pytest.approx(0.3, abs=1e-6)
    found = record(tmp_path / "out")
    settings = {k: found["on_policy"][k] for k in ("every", "max_new_tokens", "degradation")}
    assert settings == {"every": 1, "max_new_tokens": 4, "degradation": 0.5}
    assert found["on_policy"]["judge"]["model"] == "tiny"
    assert found["state"]["on_policy"]["judged"] == 8
    with Store(tmp_path / "out.store.sqlite") as store:
        assert store.count("generations") == 4


def test_a_judge_of_ones_own_and_a_mapping_of_its_settings(command, tmp_path):
    """`judging:load` scores by every character; the store has each of its scores."""
    assert main(command(judge="judging:load")) == 0
    assert record(tmp_path / "out")["signals"][0]["scorer"] == {"judge": "test"}
    with Store(tmp_path / "out.store.sqlite") as store:
        assert store.count("scores") == 4


def test_a_probe_is_fitted_kept_and_read_online(command, tmp_path, model_folder):
    harmful = write(tmp_path / "bad.jsonl", [{"prompt": f"unsafe {word}"} for word in ("one", "two", "three", "four")])
    harmless = write(
        tmp_path / "good.jsonl",
        [{"messages": conversation(f"fox {word}", "yes")} for word in ("one", "two", "six", "ten")],
    )
    files = {"probe_harmful": harmful, "probe_harmless": harmless, "policy": "adaptive"}
    assert main(command(**files, probe_layers="1,-1", probe_pooling="mean")) == 0
    probe = Probe.from_pretrained(tmp_path / "out" / "probe", model=str(model_folder))
    assert probe.layers == (1, -1)
    assert probe.pooling == "mean"
    prompts = [*prompts_of(harmful), *prompts_of(harmless)]
    assert prompts[4] == [{"role": "user", "content": "fox one"}]
    own = Probe.fit(
        prompts,
        [True] * 4 + [False] * 4,
        model=str(model_folder),
        layers=(1, -1),
        pooling="mean",
        groups=[harmful] * 4 + [harmless] * 4,
        seed=42,
    )
    assert own.identity()["sha256"] == probe.identity()["sha256"]
    assert record(tmp_path / "out")["signals"][0]["scorer"]["sha256"] == probe.identity()["sha256"]
    # In batch scope a live reference would come too late, so the prompts are scored before.
    changes = {"policy": '{"name": "adaptive", "scope": "batch"}', "output_dir": str(tmp_path / "batch")}
    assert main(command(probe=str(tmp_path / "out" / "probe"), reference="copy", **changes)) == 0
    risk = 1 - sum(probe.p_safe([f"fox {i}" for i in range(4)])) / 4
    assert first_log(tmp_path / "batch")["kl_weight"] == pytest.approx(0.1 + 0.8 * risk, abs=1e-5)
    assert record(tmp_path / "batch")["critic"]["scored"] == 4


def test_a_resumed_run_takes_the_probe_it_fitted(command, tmp_path, capsys):
    files = {
        "probe_harmful": write(tmp_path / "bad.jsonl", [{"prompt": f"unsafe {i}"} for i in range(5)]),
        "probe_harmless": write(tmp_path / "good.jsonl", [{"prompt": f"fox {i}"} for i in range(5)]),
        "policy": "adaptive",
        "save_strategy": "steps",
        "save_steps": "1",
    }
    assert main(command(**files, max_steps="2")) == 0
    before = record(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "something else"}\n')
    resumed = {"max_steps": "2", "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    assert main(command(**files, **resumed)) == 0, capsys.readouterr().err
    assert record(tmp_path / "out")["signals"] == before["signals"]


def test_a_guard_leaves_its_scores_in_the_store(command, tmp_path):
    rows = [{"messages": conversation("What color is the vault", f"The vault is {c}.")} for c in ("red", "green")]
    flags = {"guard": "world", "policy": "star", "dataset_name": write(tmp_path / "vault.jsonl", rows * 2)}
    store = {"store": str(tmp_path / "s.sqlite")}
    assert main(command(**flags, **store)) == 0
    assert record(tmp_path / "out")["critic"] == {"rows": 4, "scored": 2, "reused": 2, "left_out": 0}
    output = tmp_path / "scored.jsonl"
    argv = ["score", "--dataset_name", flags["dataset_name"], "--output", str(output), "--store", store["store"]]
    assert main(argv) == 0
    with Store(store["store"]) as kept:
        assert kept.count("scores") == 2  # the same keys: `safeshape score` asked nothing again
    assert main(command(**flags, **store, output_dir=str(tmp_path / "again"))) == 0
    assert record(tmp_path / "again")["critic"]["reused"] == 4


@pytest.mark.parametrize("recipe", ["adaptive-probe", "adaptive-judge"])
def test_the_worlds_recipes_run(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main(["train", "--config", f"recipes/world/{recipe}.yaml", *flags]) == 0
    found = record(tmp_path / "out")
    assert found["policy"]["name"] == "adaptive"
    if recipe == "adaptive-judge":
        assert found["on_policy"]["judge"]["false_negative_rate"] == 0.1
        assert found["state"]["on_policy"]["judged"] == 4
    else:
        assert found["signals"][0]["signal"] == "probe"
        assert (tmp_path / "out" / "probe" / "probe.json").exists()


BAD = [
    ({"judge": "world", "guard": "world"}, "give a guard, a probe or a judge: one of them"),
    ({"judge": "world", "probe": "p"}, "give a guard, a probe or a judge: one of them"),
    ({"judge_model": "gpt-oss-20b"}, "judge_model belongs to a judge; give --judge"),
    ({"judge_mode": "on_policy"}, "judge_mode belongs to a judge; give --judge"),
    ({"judge": "world", "judge_every": "5"}, "judge_every is for the model's own answers; give --judge_mode on_policy"),
    ({"judge": "world", "judge_mode": "always"}, "judge_mode"),
    ({"judge": "world", "judge_mode": "on_policy", "judge_every": "0"}, "judge_every and judge_max_new_tokens must be"),
    ({"judge": "world", "judge_mode": "on_policy", "judge_wait_s": "-1"}, "judge_wait_s and judge_degradation must be"),
    ({"judge": "world", "judge_mode": "on_policy", "policy": "fixed_kl"}, "policy 'fixed_kl' does not use a risk"),
    ({"judge": "world", "policy": "sft"}, "policy 'sft' does not use a risk; leave out --judge"),
    ({"judge": "world", "judge_settings": "{"}, "judge_settings is not valid JSON"),
    ({"judge": "world", "judge_settings": "[1]"}, "judge_settings must be a JSON object"),
    ({"judge": "world", "judge_settings": '{"store":"x"}'}, "judge, judge_model and store have flags of their own"),
    ({"judge": "world", "judge_settings": '{"tempo":1}'}, "tempo"),
    ({"judge": "world", "judge_settings": '{"concurrency":2}'}, "concurrency has no meaning for the world's oracle"),
    ({"judge": "world:2"}, "must lie in [0, 1]"),
    ({"judge": "no.such:judge"}, "cannot import judge 'no.such:judge'"),
    ({"judge": "http://127.0.0.1:9/v1", "judge_settings": '{"retries":0}'}, "127.0.0.1:9"),
    ({"probe": "world"}, "probe world is fitted on the embedded world's prompts; name a model of that world"),
    ({"probe": "no/such/folder"}, "no/such/folder"),
    ({"probe": "p", "probe_harmful": "a", "probe_harmless": "b"}, "give a saved probe, or prompts to fit one on"),
    ({"probe_harmful": "a.jsonl"}, "fitting a probe needs both probe_harmful and probe_harmless"),
    ({"probe_harmful": "a.jsonl", "probe_harmless": "b.jsonl"}, "a.jsonl: no such file"),
    ({"probe": "p", "probe_layers": "2"}, "probe_layers is for a probe that is fitted"),
    ({"probe_harmful": "a", "probe_harmless": "b", "probe_layers": "two"}, "probe_layers must be numbers, all or auto"),
    ({"store": "s.sqlite"}, "store and on_error are for scores made by this command"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: str(x)[:60])
def test_what_contradicts_itself_is_refused(command, tmp_path, capsys, changes, message):
    assert main(command(**changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("safeshape train: ")
    assert not (tmp_path / "out").exists()


def test_prompt_files_are_refused_by_row(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "fox"}, {"text": "no prompt"}])
    with pytest.raises(ValueError, match=r"p\.jsonl: row 1 has no `prompt` and no `messages`"):
        list(prompts_of(path))
