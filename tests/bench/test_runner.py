"""Cells are run once, fail alone and go on where a run was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_cells as work
import pytest
from filelock import FileLock

from safeshape.bench import read_matrix, run_cells, runner
from safeshape.bench.runner import rows_of

PATHS = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 2))  # this folder and the checkout


def cells_of(tmp_path, attacks, seeds=(0,)):
    content = {"model": "m", "attack": list(attacks), "defence": "d", "seed": list(seeds)}
    return read_matrix({"e": content}, {"log": str(tmp_path / "log")}, {}, "default").cells


def log(tmp_path):
    return [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def test_every_cell_is_run_once_and_found_again(tmp_path):
    cells = cells_of(tmp_path, ["a", "b"], seeds=(1, 2))
    seen = []
    out = tmp_path / "out"
    found = run_cells(cells, work.quick, out, jobs=2, progress=lambda done, total: seen.append((done, total)))
    assert found.reused == 0
    assert not found.failures
    assert {key: rows[0]["value"] for key, rows in found.rows.items()} == {c.key(): c.seed * 10 for c in cells}
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert json.loads((out / cells[0].name() / "cell.json").read_text())["attack"] == {"name": "a"}
    again = run_cells([*cells, *cells_of(tmp_path, ["c"])], work.quick, out)
    assert again.reused == 4
    assert [name for name, _ in log(tmp_path)].count("a") == 2
    assert len(log(tmp_path)) == 5


def test_jobs_are_processes_that_stay(tmp_path):
    one = cells_of(tmp_path, "abcd")
    run_cells(one, work.slow, tmp_path / "one", jobs=1)
    assert len({pid for _, pid in log(tmp_path)}) == 1
    (tmp_path / "log").unlink()
    run_cells(one, work.slow, tmp_path / "two", jobs=2)
    pids = {pid for _, pid in log(tmp_path)}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


def test_what_one_cell_breaks_the_others_do_not_notice(tmp_path):
    cells = cells_of(tmp_path, ["raises", "a", "dies", "b", "hangs", "c"])
    found = run_cells(cells, work.moody, tmp_path / "out", timeout_s=20)
    reasons = {failed.cell.attack["name"]: failed.reason for failed in found.failures}
    assert reasons == {
        "raises": "ValueError: a bad setting",
        "dies": "RuntimeError: its process died (out of memory?)",
        "hangs": "TimeoutError: not done within 20 s",
    }
    assert sorted(name for name, _ in log(tmp_path)) == ["a", "b", "c"]
    broken = tmp_path / "out" / cells[0].name()
    assert "moody" in (broken / "error.txt").read_text()
    # Failures are tried again, and what is mended is done.
    mended = run_cells(cells[:2], work.quick, tmp_path / "out")
    assert (mended.reused, len(mended.failures)) == (1, 0)
    assert rows_of(broken) == [{"value": 0, "attack": "raises"}]
    assert not (broken / "error.txt").exists()


def test_a_process_that_ends_between_two_cells_is_replaced(tmp_path):
    cells = cells_of(tmp_path, "ab")
    worker = runner._Worker()
    try:
        worker.run(work.quick, cells[0], tmp_path, 30)
        os.kill(int(log(tmp_path)[0][1]), signal.SIGKILL)
        time.sleep(0.5)
        assert worker.run(work.quick, cells[1], tmp_path, 30) == [{"value": 0, "attack": "b"}]
    finally:
        worker.close()
    assert len({pid for _, pid in log(tmp_path)}) == 2


def test_a_killed_run_goes_on_and_leaves_no_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; import bench_cells, test_runner\n"
        "from safeshape.bench import run_cells\n"
        "if __name__ == '__main__':\n"
        "    here = Path(sys.argv[1])\n"
        "    run_cells(test_runner.cells_of(here, 'abcdefghijkl'), bench_cells.slow, here / 'out', jobs=2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": PATHS})
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*/rows.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _alive({int(pid) for _, pid in log(tmp_path)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive({int(pid) for _, pid in log(tmp_path)})
    before = len(list((tmp_path / "out").glob("*/rows.json")))
    assert 3 <= before < 12
    found = run_cells(cells_of(tmp_path, "abcdefghijkl"), work.slow, tmp_path / "out", jobs=2)
    assert (found.reused, len(found.rows)) == (before, 12)
    assert len(log(tmp_path)) <= 12 + 2  # at most what was under way is done twice


def _alive(pids):
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)}


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_two_runs_do_not_share_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "lock"), pytest.raises(ValueError, match="another run uses"):
        run_cells(cells_of(tmp_path, "a"), work.quick, tmp_path / "out")


def test_ray_gives_the_same_rows_and_isolates_too(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", PATHS)
    cells = cells_of(tmp_path, ["a", "raises", "b"])
    found = run_cells(cells, work.moody, tmp_path / "out", engine="ray", jobs=2)
    assert sorted(rows[0]["attack"] for rows in found.rows.values()) == ["a", "b"]
    assert [failed.reason for failed in found.failures] == ["ValueError: a bad setting"]
    assert "ValueError: a bad\nsetting" in (tmp_path / "out" / cells[1].name() / "error.txt").read_text()
