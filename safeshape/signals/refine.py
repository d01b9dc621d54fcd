"""Scoring a trajectory coarsely and then only where it moves.

Every `stride`-th partial answer is scored, and the first and the last; then an interval whose two ends differ by more
than a tolerance is halved until it does not, or has nothing left inside. What was never scored takes the lower of the
two scores around it: it differs from both by the tolerance at most, and text is never called safer than a measured
neighbour. What this cannot see is a dip that begins and ends within one interval whose ends agree; `stride` bounds how
long it can be, and a sample of rows is scored in full to say how much was missed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Refine:
    """Settings: scores differing by at most `tolerance` settle an interval; the first round takes each `stride`-th end.

    `check_every`: each such row is scored in full as well, to measure the deviation; 0 for none.
    """

    tolerance: float = 0.05
    stride: int = 8
    check_every: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must lie in [0, 1], got {self.tolerance}")
        if self.stride < 1 or self.check_every < 0:
            raise ValueError(
                f"stride must be at least 1 and check_every at least 0, got {self.stride}, {self.check_every}"
            )


@dataclass(kw_only=True)
class RefineReport:
    """What refining saved and cost over a run, filled in as rows are scored.

    `ends`: partial answers; `scored`: how many of them were run. `checked`: rows scored in full beside, and
    `checked_ends` their partial answers. `beyond`: how many of these were off by more than the tolerance;
    `largest_deviation`: the largest difference between a filled-in score and the true one, and `largest_overrating` the
    largest by which text was called safer than it is; None before the first. The branches run only for the check are
    not part of `scored`.
    """

    rows: int = 0
    ends: int = 0
    scored: int = 0
    checked: int = 0
    checked_ends: int = 0
    beyond: int = 0
    largest_deviation: float | None = None
    largest_overrating: float | None = None

    @property
    def saved(self) -> int:
        """Branches that were not run."""
        return self.ends - self.scored

    def add(self, scored: Mapping[int, float], count: int) -> None:
        """Count one refined row of `count` ends."""
        self.rows, self.ends, self.scored = self.rows + 1, self.ends + count, self.scored + len(scored)

    def check(self, filled: Sequence[float], true: Sequence[float], tolerance: float) -> None:
        """Compare one row's scores with those of all its partial answers."""
        above = [a - b for a, b in zip(filled, true, strict=True)]
        self.checked, self.checked_ends = self.checked + 1, self.checked_ends + len(above)
        self.beyond += sum(abs(value) > tolerance for value in above)
        self.largest_deviation = max(self.largest_deviation or 0.0, max(map(abs, above)))
        self.largest_overrating = max(self.largest_overrating or 0.0, max(above))


def wanted(scored: Mapping[int, float], count: int, refine: Refine | None) -> list[int]:
    """Which ends to score next, given those scored so far; empty when done. Without settings: all of them, at once."""
    if refine is None:
        return [] if scored else list(range(count))
    if not scored:
        return sorted({*range(0, count, refine.stride), count - 1})
    known = sorted(scored)
    return [
        (left + right) // 2
        for left, right in pairwise(known)
        if right - left > 1 and abs(scored[left] - scored[right]) > refine.tolerance
    ]


def filled(scored: Mapping[int, float], count: int) -> list[float]:
    """The scores of all ends: those scored, and between two of them the lower one."""
    known = sorted(scored)
    values = [scored.get(index, 0.0) for index in range(count)]
    for left, right in pairwise(known):
        for index in range(left + 1, right):
            values[index] = min(scored[left], scored[right])
    return values
