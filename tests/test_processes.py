"""Two gloo processes on a CPU, data parallel and fully sharded, give the losses of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from safeshape.policies import POLICIES

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes" / "accelerate"
SPECS = [
    *({"policy": name, "reference": "copy", "lora": False} for name in sorted(POLICIES)),
    *({"policy": name, "reference": "adapter_off", "lora": True} for name in sorted(POLICIES)),
    {"policy": {"name": "adaptive", "scope": "batch", "ema": 0.5}, "reference": "cached", "lora": False},
    *({"policy": "fixed_kl", "reference": kind, "lora": True} for kind in ("copy", "cached")),
    {"policy": "constrained", "reference": "cached", "lora": False},
]
# Answers during training need whole weights in every process, so data parallel only.
JUDGED = [
    {"policy": {"name": "adaptive"}, "reference": "copy", "lora": False, "every": 2},
    {
        "policy": {"name": "adaptive", "scope": "batch", "ema": 0.5},
        "reference": "adapter_off",
        "lora": True,
        "every": 1,
    },
    {"policy": {"name": "adaptive"}, "reference": "cached", "lora": False, "every": 1},
]


def launch(folder, *launcher, specs=SPECS, **variables):
    folder.mkdir()
    (folder / "specs.json").write_text(json.dumps(specs))
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [*launcher, str(TESTS / "worker.py"), str(folder), str(folder / "specs.json")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone") / "run", sys.executable)


def for_two_cpus(recipe, folder):
    """The shipped configuration with what this machine is: two CPU processes, single precision."""
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    settings |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(("recipe", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDP")])
def test_two_processes_equal_one(tmp_path, alone, recipe, wrapper):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    together = launch(tmp_path / "run", *accelerate, "--config_file", str(for_two_cpus(recipe, tmp_path)))
    for spec, one, two in zip(SPECS, alone, together, strict=True):
        assert (one["processes"], two["processes"], two["head"]) == (1, 2, "fused")
        assert two["wrapped"].startswith(wrapper)
        for name in ("loss", "kl", "kl_weight", "num_tokens"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (spec, name)
        if spec["reference"] == "cached":
            assert one["shards"] == two["shards"] > 2


def test_processes_share_their_verdicts(tmp_path):
    """Each process has its own rows judged; risks, means and counts are those of one process, in both of them."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    one = launch(tmp_path / "one", sys.executable, specs=JUDGED)
    configuration = str(for_two_cpus("ddp", tmp_path))
    two = launch(tmp_path / "two", *accelerate, "--config_file", configuration, specs=JUDGED)
    for spec, alone, together in zip(JUDGED, one, two, strict=True):
        assert together["processes"] == 2
        assert together["verdicts"] == together["verdicts_of_the_other"] == alone["verdicts"], spec
        assert len(alone["verdicts"]["by_row"]) > 4
        for name in ("loss", "kl", "kl_weight"):
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), (spec, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"policy": "star", "reference": "copy", "lora": False},
        {"policy": "star", "reference": "cached", "lora": False},
        {"policy": "fixed_kl", "reference": "adapter_off", "lora": True},
    ],
    ids=lambda spec: spec["reference"],
)
def test_zero3_equals_one_process(tmp_path, spec):
    """One run a launch: DeepSpeed does not end a second engine in the same process."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    one = launch(tmp_path / "one", sys.executable, specs=[spec])[0]
    configuration = str(for_two_cpus("zero3", tmp_path))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration]
    two = launch(tmp_path / "two", *accelerate, specs=[spec], DS_ACCELERATOR="cpu")[0]
    assert (two["processes"], two["wrapped"], two["head"]) == (2, "DeepSpeedEngine", "fused")
    for name in ("loss", "kl", "kl_weight", "num_tokens"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
