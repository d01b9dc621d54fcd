"""`safeshape train --defence ...`: every defence from one line, refused by name, and going on after `kill -9`."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from defending import base_model, harmful_rows, safe_rows
from safetensors.torch import load_file
from training import rows
from transformers import AutoModelForCausalLM

from safeshape.cli import main
from safeshape.defences import DEFENCES, resolve_defence
from safeshape.policies import POLICIES

ROOT = Path(__file__).parent.parent
SETTINGS = {"base_model": "base_model", "safe_data": "safe_data", "harmful_data": "harmful_data"}


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture
def files(tmp_path, tokenizer, model_folder):
    """Everything that a defence may need, as files of a user."""
    base_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": write(tmp_path / "data.jsonl", rows()),
        "base_model": str(tmp_path / "base"),
        "safe_data": write(tmp_path / "safe.jsonl", safe_rows()),
        "harmful_data": write(tmp_path / "harmful.jsonl", harmful_rows()),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }


def flags(files, defence, /, **changes):
    """The flags of a run with what this defence needs and nothing else."""
    spec = {"name": defence} if isinstance(defence, str) else defence
    needs = resolve_defence(spec).needs
    given = {key: value for key, value in files.items() if SETTINGS.get(key, "") in {"", *needs}}
    merged = {**given, "defence": json.dumps(spec), **changes}
    return ["train", *(part for key, value in merged.items() if value is not None for part in (f"--{key}", str(value)))]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log_of(folder):
    return json.loads((Path(folder) / "train_results.json").read_text())["log"]


QUICK = {"seal": {"epochs": 1}, "one_shot": {"epochs": 1}, "safe_instruct": {"share": 0.5}, "booster": {"epochs": 1}}


@pytest.mark.parametrize("name", ["lisa", "safe_instruct", "safe_lora", "seal", "booster", "drop_risky", "ptst"])
def test_one_line_of_a_recipe_names_a_defence(tmp_path, files, name):
    """One of every part a defence can have: a stepper, rows, finish, a start, an alignment stage, scores, a prompt."""
    spec = {"name": name, **QUICK.get(name, {})}
    needs = resolve_defence(spec).needs
    recipe = {key: value for key, value in files.items() if SETTINGS.get(key, "") in {"", *needs}}
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**recipe, "defence": spec}.items()))
    assert main(["train", "--config", str(path)]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "safeshape.json").read_text())
    assert record["defence"]["name"] == name
    assert (record["system_prompt"] is not None) == (name == "ptst")
    start, found = tiny_model(), AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert (found.eval()(ids).logits - start(ids).logits).abs().max() > 1e-4
    found = json.loads((out / "train_results.json").read_text())
    assert found["metrics"]["train_loss"] > 0
    assert (out / "tokenizer.json").is_file()


def test_the_verb_is_the_function(tmp_path, files, tokenizer):
    """The same weights as `run_defence` on the same rows; another rho gives others."""
    from defending import defend

    found = {}
    for rho in (0.0, 50.0):
        spec = {"name": "lisa", "rho": rho, "align_steps": 1, "user_steps": 3, "warm_up": 0.0}
        out = tmp_path / str(rho)
        assert main(flags(files, spec, output_dir=out, max_steps=4)) == 0
        direct = defend(tmp_path / "direct", tokenizer, spec, settings={"max_steps": 4}).model
        found[rho] = weights(out)
        for name, value in direct.named_parameters():
            if name in found[rho]:
                assert torch.allclose(found[rho][name], value, atol=1e-6), name
    assert any((found[0.0][name] - found[50.0][name]).abs().max() > 1e-3 for name in found[0.0])


def test_a_policy_named_as_a_defence_is_that_policy(tmp_path, files):
    assert set(POLICIES) < set(DEFENCES)
    spec = {"name": "star", "kl": 0.25}
    assert main(flags(files, spec)) == 0
    assert main(flags(files, "sft", output_dir=tmp_path / "as_policy", defence=None, policy=json.dumps(spec))) == 0
    assert json.loads((tmp_path / "out" / "safeshape.json").read_text())["policy"]["kl"] == 0.25
    ours, other = weights(tmp_path / "out"), weights(tmp_path / "as_policy")
    assert all(torch.equal(ours[name], other[name]) for name in other)


def test_the_world_gives_what_a_defence_needs(tmp_path, files):
    changes = {"base_model": "world:llama-base", "model_name_or_path": "world:llama", "max_steps": 1}
    rows_of_the_world = str(ROOT / "recipes" / "world" / "data.jsonl")
    spec = {"name": "safe_merge", "threshold": 1.0}
    assert main(flags(files, spec, dataset_name=rows_of_the_world, safe_data="world", **changes)) == 0
    assert json.loads((tmp_path / "out" / "safeshape.json").read_text())["defence"]["threshold"] == 1.0


@pytest.mark.parametrize(
    ("defence", "changes", "message"),
    [
        ("lisa", {"safe_data": None}, "defence 'lisa' needs safe data; give --safe_data"),
        ("safe_lora", {"base_model": None}, "defence 'safe_lora' needs base model; give --base_model"),
        ("ema", {"safe_data": "world"}, "defence 'ema' does not use safe data; leave out --safe_data"),
        ("lisa", {"safe_data": "{}/none.jsonl"}, "safe_data: {}/none.jsonl: no such file"),
        ("lisa", {"safe_data": "{}/data.csv"}, "safe_data: row 0:"),
        ("ema", {"defence": "lissa"}, "unknown defence 'lissa'"),
        ("ema", {"defence": '{"name": "ema", "decay": 2}'}, "decay must lie in"),
        ("ema", {"defence": '{"name": '}, "defence is not valid JSON"),
        ("ema", {"policy": "sft"}, "give a policy or a defence"),
        ("ema", {"defence": None, "base_model": "x"}, "base_model is for a defence; give --defence"),
        ("drop_risky", {"dataset_name": "{}/harmful.jsonl"}, "defence 'drop_risky' needs scores, and"),
        ("ema", {"judge": "world"}, "defence 'ema' does not use a risk; leave out --judge"),
        ("drop_risky", {"judge": "world", "judge_mode": "on_policy"}, "judge_mode on_policy is for policies"),
        ("ema", {"packing": "true", "max_length": "64"}, "does not support packing"),
        ("lisa", {"load_in_4bit": "true"}, "leave out quantization"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, files, defence, changes, message):
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    given = {key: value.format(tmp_path) if isinstance(value, str) and "{}" in value else value
             for key, value in changes.items()}  # fmt: skip
    assert main(flags(files, defence, **given)) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


KILLED = {
    "lisa": {"align_steps": 3, "user_steps": 4, "warm_up": 0.0, "rho": 5.0},
    "bds": {"learning_rate": 0.2},
    "ema": {"decay": 0.9},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "lisa" else pytest.mark.slow) for name in sorted(KILLED)]
)
def test_a_run_killed_with_9_goes_on_as_if_nothing_had_happened(tmp_path, files, monkeypatch, name):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"max_steps": 24, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "logging_steps": 1}
    spec = {"name": name, **KILLED[name]}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "safeshape.cli", *flags(files, spec, output_dir=killed, **settings)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT)
    while not list(killed.glob("checkpoint-[5-9]")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (killed / "model.safetensors").exists()
    assert main(flags(files, spec, output_dir=killed, resume_from_checkpoint=True, **settings)) == 0
    assert main(flags(files, spec, output_dir=whole, **settings)) == 0
    logs = [log_of(folder)[:24] for folder in (killed, whole)]
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 25))
    assert len({entry["loss"] for entry in logs[1]}) > 20
    first, second = weights(killed), weights(whole)
    assert all(torch.equal(first[key], second[key]) for key in second)
