"""Runs cells, several at a time, each apart from the others: what one breaks, the others do not notice.

A cell is done when its folder holds `rows.json`, written last and whole. After `kill -9` the same call runs what is not
done; cells that failed are tried again. Nothing heavy is imported here: workers import it for themselves.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TooLong
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from filelock import FileLock, Timeout

from safeshape.bench.matrix import Cell

Work = Callable[[Cell, Path], list[dict[str, Any]]]  # a cell and its folder to rows of results
ROWS, ERROR = "rows.json", "error.txt"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A cell without rows. `reason`: one line; the whole trace is in the cell's folder."""

    cell: Cell
    reason: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What came of a run: rows by the cells' keys, the failures, and how many cells had rows before."""

    rows: dict[str, list[dict[str, Any]]]
    failures: tuple[Failed, ...]
    reused: int


def run_cells(
    cells: Sequence[Cell],
    work: Work,
    folder: Path,
    *,
    jobs: int = 1,
    engine: Literal["local", "ray"] = "local",
    timeout_s: float = 3600.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Finished:
    """Run every cell that has no rows yet; `work` must be importable by its name.

    `jobs`: cells at a time, or processors of the Ray that is started here where none runs. `timeout_s`: of one cell,
    after which it counts as failed; local only. A cell that ends its whole process (out of memory, a crash in native
    code) fails alone.
    Errors: ValueError when another run uses the folder, or Ray is asked for and not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        done = {cell.key(): rows for cell in cells if (rows := rows_of(folder / cell.name())) is not None}
        reused, failures = len(done), []
        left = [cell for cell in cells if cell.key() not in done]
        for cell in left:
            _write(folder / cell.name() / "cell.json", asdict(cell))
        progress(reused, len(cells))
        run = _local if engine == "local" else _on_ray
        for place, (cell, outcome) in enumerate(run(left, work, folder, jobs, timeout_s), start=1):
            if isinstance(outcome, BaseException):
                failures.append(_failed(cell, outcome, folder / cell.name()))
            else:
                _write(folder / cell.name() / ROWS, outcome)
                (folder / cell.name() / ERROR).unlink(missing_ok=True)
                done[cell.key()] = outcome
            progress(reused + place, len(cells))
    return Finished(rows=done, failures=tuple(failures), reused=reused)


def rows_of(folder: Path) -> list[dict[str, Any]] | None:
    """The rows of a cell's folder, None where it is not done."""
    path = folder / ROWS
    return list(json.loads(path.read_text())) if path.exists() else None


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _failed(cell: Cell, error: BaseException, folder: Path) -> Failed:
    (folder / ERROR).write_text("".join(traceback.format_exception(error)))
    words = " ".join(str(error).split())
    return Failed(cell=cell, reason=f"{type(error).__name__}: {words}"[:300])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run uses {folder}") from error
    try:
        yield
    finally:
        lock.release()


# -- in processes of this machine -----------------------------------------------------------------------------------


def _with_parent() -> None:
    """End this worker when its parent ends, however that ends: a killed run shall leave nothing behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Worker:
    """One process that runs a cell after the other, and is replaced when it dies."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def run(self, work: Work, cell: Cell, folder: Path, timeout_s: float) -> list[dict[str, Any]]:
        pid = self._pid()
        assert self.pool is not None
        try:
            return self.pool.submit(work, cell, folder).result(timeout=timeout_s)
        except TooLong as error:
            os.kill(pid, signal.SIGKILL)
            self.close()
            raise TimeoutError(f"not done within {timeout_s:g} s") from error
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError("its process died (out of memory?)") from error

    def _pid(self) -> int:
        """The process, made anew where there is none yet or the last one ended between two cells."""
        if self.pool is not None:
            try:
                return self.pool.submit(os.getpid).result()
            except BrokenProcessPool:
                self.close()
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_with_parent)
        return self.pool.submit(os.getpid).result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = None


Outcome = list[dict[str, Any]] | Exception


def _local(
    cells: Sequence[Cell], work: Work, folder: Path, jobs: int, timeout_s: float
) -> Iterator[tuple[Cell, Outcome]]:
    workers = [_Worker() for _ in range(jobs)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(cell: Cell) -> Outcome:
        worker = free.get()
        try:
            return list(worker.run(work, cell, folder / cell.name(), timeout_s))
        except Exception as error:  # isolation is the point: the reason is kept and listed
            return error
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(jobs)
    futures: dict[Future[Outcome], Cell] = {threads.submit(one, cell): cell for cell in cells}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


# -- on a cluster ---------------------------------------------------------------------------------------------------


def _on_ray(
    cells: Sequence[Cell], work: Work, folder: Path, jobs: int, timeout_s: float
) -> Iterator[tuple[Cell, Outcome]]:
    """Each cell a Ray task with one processor; `folder` must be seen by every node.

    Differs from the local engine: no time limit, since Ray's own bound counts the wait for a free node too.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine ray needs Ray: pip install 'safeshape[ray]'") from error
    started = not ray.is_initialized()
    if started:
        own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
        ray.init(logging_level="ERROR", log_to_driver=False, **own)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(work)
        waiting = {task.remote(cell, (folder / cell.name()).resolve()): cell for cell in cells}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(ready[0])
            try:
                yield cell, list(ray.get(ready[0]))
            except ray.exceptions.RayTaskError as error:  # what the cell raised; Ray's own text has the trace
                error.cause.__cause__ = error
                yield cell, error.cause
            except ray.exceptions.RayError as error:
                yield cell, error
    finally:
        if started:
            ray.shutdown()
