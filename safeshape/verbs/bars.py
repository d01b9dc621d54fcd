"""Progress bars on standard error for long steps."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function `progress(label, done, total)` that draws one bar per label."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    drawn = Progress(*columns, console=Console(stderr=True))
    known: dict[str, TaskID] = {}

    def progress(label: str, done: int, total: int) -> None:
        drawn.start()
        if label not in known:
            known[label] = drawn.add_task(label, total=total)
        drawn.update(known[label], completed=done, total=total)

    try:
        yield progress
    finally:
        if known:  # stopping bars that never started would print an empty line
            drawn.stop()
