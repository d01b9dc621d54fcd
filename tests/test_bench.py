"""The bench scripts run and write what they measured; their figures are no business of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNS = {
    "attacks": "--size 20 --held_out 10 --epochs 1 --only trigger",
    "head": "--vocab 512 --tokens 16 --hidden 8 --repeats 1 --methods dense trl --no-memory",
    "train": "--vocab 512 --length 16 --batch 2 --steps 2 --rounds 1 --no-memory --methods sft cached adapter_off copy "
    "paper trl",
    "star": "--lengths 16 --curve --header 8 --suffix 4 --repeats 1 --responses 0 --batch_sizes 4",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(RUNS))
def test_a_bench_runs(tmp_path, script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{script}.py"), *RUNS[script].split(), "--output", str(tmp_path / "o")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "o").read_text())
