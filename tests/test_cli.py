"""The command line as a user meets it: help at once, one sentence for bad input, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import conversation
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safeshape.cli import VERBS, main
from safeshape.provenance import last_complete_checkpoint
from safeshape.signals.probes import Probe
from safeshape.train import parse_settings

ROOT = Path(__file__).parent.parent


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def scored(answer="two three", p_safe=1.0):
    return {"messages": conversation("one", answer), "safety": {"signal": "mine", "p_safe": p_safe, "spans": []}}


@pytest.fixture
def command(tmp_path, model_folder):
    """A training command that works; tests change it."""
    data = write(
        tmp_path / "data.jsonl", [scored(), scored("four five six", 0.0), scored("seven"), scored("eight nine")]
    )
    flags = {
        "model_name_or_path": str(model_folder),
        "dataset_name": data,
        "output_dir": str(tmp_path / "out"),
        "max_steps": "2",
        "per_device_train_batch_size": "2",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "gradient_checkpointing": "false",
        "use_cpu": "true",
    }

    def arguments(**changes):
        merged = {**flags, **changes}
        return ["train", *(part for k, v in merged.items() if v is not None for part in (f"--{k}", str(v)))]

    return arguments


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_needs_no_heavy_import(verb):
    code = f"import sys; from safeshape.cli import main; main(['{verb}', '--help'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "--" in done.stdout
    assert not any(
        line.split("|")[-1].strip() in ("torch", "transformers", "datasets") for line in done.stderr.splitlines()
    )


def test_verbs_and_version(capsys):
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "unknown verb 'trian'; known: demo, train" in capsys.readouterr().err


def test_a_users_own_files_train(command, tmp_path, capsys):
    assert main(command()) == 0, capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "safeshape.json").read_text())["policy"]["name"] == "star"
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["metrics"]["train_loss"] > 0
    assert main(command()) == 2
    assert "already holds another run (safeshape.json)" in capsys.readouterr().err


def test_a_byte_order_mark_and_blank_lines_are_no_obstacle(command, tmp_path, capsys):
    path = tmp_path / "marked.jsonl"
    path.write_text("\n\n" + json.dumps(scored()) + "\n\n" + json.dumps(scored("four")) + "\n", encoding="utf-8-sig")
    assert main(command(dataset_name=str(path))) == 0, capsys.readouterr().err


def test_lora_from_flags(command, tmp_path, model_folder):
    assert main(command(use_peft="true", lora_r="2", lora_target_modules="all-linear")) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "safeshape.json").read_text())["model"] == str(model_folder)


def test_flags_win_over_the_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("dataset_name: a\nlearning_rate: 1.0e-5\nnum_train_epochs: 7\npolicy: {name: star, kl: 0.25}\n")
    config, args, _ = parse_settings(["--config", str(path), "--learning_rate", "3e-5"])
    assert args.learning_rate == 3e-5
    assert args.num_train_epochs == 7
    assert config.policy == {"name": "star", "kl": 0.25}
    config, _, _ = parse_settings(["--dataset_name", "a", "--policy", '{"name": "fixed_kl", "beta": 0.1}'])
    assert config.policy == {"name": "fixed_kl", "beta": 0.1}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_parse(recipe):
    config, args, _ = parse_settings(["--config", str(recipe), "--dataset_name", "d", "--output_dir", "o"])
    assert args.num_train_epochs > 0
    assert config.policy
    assert len(list((ROOT / "recipes").iterdir())) <= 10


BAD_FLAGS = [
    ({"policy": "stars"}, "unknown policy 'stars'; known: sft"),
    ({"policy": '{"name": "star", "lam": 1}'}, "policy 'star' has no parameter 'lam'; it has: kl"),
    ({"policy": '{"name":'}, "policy is not valid JSON"),
    ({"learnig_rate": "1"}, "unknown setting '--learnig_rate'; did you mean '--learning_rate'?"),
    ({"learning_rate": "fast"}, "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
    ({"reference": "base"}, "reference"),
    ({"gradient_floor": "-1"}, "gradient_floor must be at least 0"),
    ({"dataset_name": "missing.jsonl"}, "missing.jsonl: no such file or folder"),
    ({"dataset_name": None}, "dataset_name"),
    ({"model_name_or_path": None}, "model_name_or_path must be given"),
    ({"model_name_or_path": "./no/such/model"}, "no/such/model"),
    ({"output_dir": None}, "output_dir must be given"),
    ({"packing": "true", "packing_strategy": "wrapped"}, "does not support packing_strategy"),
    ({"guard": "world", "probe": "x"}, "give a guard, a probe or a judge: one of them"),
    ({"max_length": "4"}, "row 0: has"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FLAGS, ids=lambda x: str(x)[:40])
def test_bad_flags(command, tmp_path, capsys, changes, message):
    assert main(command(**changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("safeshape train: ")
    assert not (tmp_path / "out").exists()


BAD_DATA = [
    ([], "is empty"),
    (["{not json"], "line 1 is not valid JSON"),
    (["[1, 2]"], "line 1 is not a JSON object"),
    ([{"text": "a"}], "row 0: needs `messages`, or `prompt` and `completion`"),
    ([{"messages": conversation("a", "b")}], "has no `safety` column; give --guard, --probe or --judge"),
    ([scored(), {**scored(), "messages": [{"role": "user", "content": "a"}]}], "train row 1: the last message must be"),
    ([scored(" ")], "row 0: the assistant's answer is empty"),
    ([scored(p_safe=1.5)], "train row 0: safety p_safe must be a number in [0, 1], got 1.5"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_DATA, ids=lambda x: str(x)[:40])
def test_bad_data(command, tmp_path, capsys, rows, message):
    assert main(command(dataset_name=write(tmp_path / "bad.jsonl", rows))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_a_typo_or_bad_value_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    for text, message in (
        ("learnig_rate: 1", "unknown setting 'learnig_rate'; did you mean 'learning_rate'?"),
        (
            "dataset_name: d\nlearning_rate: fast",
            "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        ),
        ("dataset_name: d\nlearning_rate: [1, 2]", "learning_rate takes one value, got a list"),
        ("dataset_name: d\nreference: frozen", "reference"),
        ("- a list", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
    ):
        path.write_text(text)
        assert main(["train", "--config", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--size", "9"], "size must be 20 to 500"),
        (["demo", "--family", "gpt"], "family"),
        (["demo", "--epochs", "0"], "epochs must be at least 1"),
        (["demo", "--sead", "1"], "--sead"),
        (["world", "build"], "output_dir must be given"),
        (["world", "break"], "break"),
        (["score", "--dataset_name", "x.jsonl"], "output must be given"),
    ],
)
def test_other_verbs_refuse_bad_settings(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_world_lists_what_is_shipped(capsys, tmp_path):
    assert main(["world"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = ["world:llama", "world:qwen3", "world:phi3", "world:llama-base", "world:guard"]
    assert [line.split()[0] for line in lines] == shown
    assert all((Path(line.split()[1]) / "model.safetensors").exists() for line in lines)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["world", "build", "--output_dir", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_score_writes_a_column_that_train_reads(command, tmp_path, capsys):
    plain = write(
        tmp_path / "plain.jsonl", [{"messages": conversation("What color is the vault", "The vault is red.")}] * 4
    )
    output = tmp_path / "scored.jsonl"
    assert main(["score", "--dataset_name", plain, "--output", str(output)]) == 0
    row = json.loads(output.read_text().splitlines()[0])
    assert row["safety"]["signal"] == "star"
    assert row["safety"]["spans"][-1]["end"] == len("The vault is red.")
    assert main(["score", "--dataset_name", plain, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(command(dataset_name=str(output))) == 0


@pytest.mark.parametrize("name", ["scored.parquet", "scored"])
def test_other_forms_of_scored_data_train_as_well(command, tmp_path, name):
    plain = write(
        tmp_path / "plain.jsonl", [{"messages": conversation("What color is the vault", "The vault is red.")}] * 4
    )
    assert main(["score", "--dataset_name", plain, "--output", str(tmp_path / name), "--chunk", "2"]) == 0
    assert main(command(dataset_name=str(tmp_path / name))) == 0
    (signal_record,) = json.loads((tmp_path / "out" / "safeshape.json").read_text())["signals"]
    assert signal_record["scorer"]["chunk"] == 2
    assert signal_record["rows"] == 4


def test_csv_with_prompts_and_completions_trains(command, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\none two," three, four"\nfive," six"\n')
    assert main(command(dataset_name=str(path), policy="sft")) == 0


def test_a_probe_named_in_the_command_scores_the_data(command, tmp_path, model_folder):
    probe = Probe.fit(
        ["fox one", "fox two", "unsafe one", "unsafe two"], [False, False, True, True], model=str(model_folder)
    )
    probe.save_pretrained(tmp_path / "probe")
    plain = write(tmp_path / "plain.jsonl", [{"messages": conversation("unsafe one", "two three")}] * 4)
    assert main(command(dataset_name=plain, probe=str(tmp_path / "probe"), policy="adaptive")) == 0
    record = json.loads((tmp_path / "out" / "safeshape.json").read_text())
    assert record["signals"][0]["signal"] == "probe"
    log = json.loads((tmp_path / "out" / "train_results.json").read_text())["log"]
    risk = 1 - probe.p_safe(["unsafe one"])[0]
    assert log[0]["kl_weight"] == pytest.approx(0.1 + 0.8 * risk, abs=1e-5)
    assert log[0]["ce_weight"] == pytest.approx(0.9 - 0.8 * risk, abs=1e-5)


def test_a_probe_beside_a_policy_without_reference_scores_the_data_first(command, tmp_path, model_folder):
    probe = Probe.fit(["fox one", "fox two", "unsafe one", "unsafe two"], [0, 0, 1, 1], model=str(model_folder))
    probe.save_pretrained(tmp_path / "probe")
    plain = write(tmp_path / "plain.jsonl", [{"messages": conversation("unsafe one", "two three")}] * 4)
    assert main(command(dataset_name=plain, probe=str(tmp_path / "probe"), policy="soft_weight")) == 0
    log = json.loads((tmp_path / "out" / "train_results.json").read_text())["log"]
    assert log[0]["ce_weight"] == pytest.approx(probe.p_safe(["unsafe one"])[0], abs=1e-5)


def test_train_scores_with_a_guard_by_itself(command, tmp_path):
    plain = write(
        tmp_path / "plain.jsonl", [{"messages": conversation("What color is the vault", "The vault is red.")}] * 4
    )
    assert main(command(dataset_name=plain, guard="world", model_name_or_path="world:qwen3")) == 0
    record = json.loads((tmp_path / "out" / "safeshape.json").read_text())
    assert record["signals"][0]["scorer"]["guard"] == "world"


def test_a_killed_run_resumes_to_the_same_weights(command, tmp_path, monkeypatch):
    """With everything that has a state: a smoothed batch risk from verdicts on the model's own answers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": "1", "save_total_limit": "3"}
    settings |= {"policy": '{"name": "adaptive", "scope": "batch", "ema": 0.9}', "logging_steps": "1"}
    settings |= {"judge": "judging:load", "judge_mode": "on_policy", "judge_every": "3", "judge_wait_s": "60"}
    settings |= {"judge_max_new_tokens": "4", "learning_rate": "1e-2"}
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    run = [sys.executable, "-m", "safeshape.cli"]
    process = subprocess.Popen([*run, *command(output_dir=killed, **settings)], stderr=subprocess.DEVNULL)
    while not list(Path(killed).glob("checkpoint-[4-9]")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = [*command(output_dir=killed, **settings), "--resume_from_checkpoint", "true"]
    subprocess.run([*run, *resumed], check=True, capture_output=True)
    subprocess.run([*run, *command(output_dir=whole, **settings)], check=True, capture_output=True)
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(first[name], second[name]) for name in second)
    states = [json.loads((Path(folder) / "safeshape.json").read_text())["state"] for folder in (killed, whole)]
    assert states[0] == states[1]
    assert (states[0]["updates"], states[0]["on_policy"]["rounds"]) == (40, 14)
    logs = [json.loads((Path(folder) / "train_results.json").read_text())["log"][:40] for folder in (killed, whole)]
    for name in ("loss", "batch_risk", "kl_weight", "judge/risk", "judge/staleness"):
        assert [entry[name] for entry in logs[0]] == [entry[name] for entry in logs[1]], name
    assert len({entry["batch_risk"] for entry in logs[1]}) > 30


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (9, "{}"), (10, '{"cut'), (11, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "safeshape.json").write_text("{}")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert last_complete_checkpoint(tmp_path / "none") is None
