"""The rows of a dataset with a judge's verdicts beside them, and verdicts that rows carry."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safeshape.data import Message, as_messages
from safeshape.signals.column import as_column
from safeshape.signals.judges.judging import Judging, judgement_score
from safeshape.signals.rubric import CATEGORIES, NONE, SCORES
from safeshape.types import Judgement

Row = Mapping[str, Any]
SCORE, CATEGORY = "judge_score", "judge_category"


@dataclass(kw_only=True)
class Tally:
    """What became of the rows. `scores`, `categories`: how many rows got each; `failed`: rows without a verdict."""

    rows: int = 0
    failed: int = 0
    first_failure: str | None = None
    scores: "Counter[int]" = field(default_factory=Counter)
    categories: "Counter[str]" = field(default_factory=Counter)

    def add(self, index: int, judgement: Judgement) -> None:
        """Count one row."""
        self.rows += 1
        if judgement.score is None:
            self.failed += 1
            self.first_failure = self.first_failure or f"row {index}: {judgement.error}"
        else:
            self.scores[judgement.score] += 1
            self.categories[judgement.category or NONE] += 1


def verdicts(
    rows: Iterable[Row], judge: Judging, *, progress: Callable[[int], None] = lambda done: None
) -> Iterator[tuple[Row, Judgement]]:
    """Every row, in order, with the verdict on its conversation; a row that holds none has a verdict without a score.

    `progress` is called with the number of rows done.
    """
    waiting: deque[tuple[Row, str | None]] = deque()
    done = 0

    def conversations() -> Iterator[Sequence[Message]]:
        for row in rows:
            try:
                messages = as_messages(row)
            except ValueError as error:
                waiting.append((row, str(error)))
            else:
                waiting.append((row, None))
                yield messages

    def unusable() -> Iterator[tuple[Row, Judgement]]:
        while waiting and waiting[0][1] is not None:
            row, reason = waiting.popleft()
            yield row, Judgement(score=None, error=reason)

    for judgement in judge.judge_many(conversations()):
        for pair in unusable():
            done += 1
            yield pair
        done += 1
        yield waiting.popleft()[0], judgement
        progress(done)
    yield from unusable()


def judged_rows(
    rows: Iterable[Row],
    judge: Judging,
    tally: Tally,
    *,
    keep_failures: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[dict[str, Any]]:
    """The rows in order, each with its `safety`, its judge_score and its judge_category; such columns give way.

    Errors: ValueError that names the row when one gets no verdict and `keep_failures` is False, or that there are none.
    """
    identity = judge.identity()
    for index, (row, judgement) in enumerate(verdicts(rows, judge, progress=progress)):
        if judgement.score is None and not keep_failures:
            raise ValueError(f"row {index}: {judgement.error}")
        tally.add(index, judgement)
        safety = as_column(judgement_score(judgement, identity))
        yield {**row, "safety": safety, SCORE: judgement.score, CATEGORY: judgement.category}
    if tally.rows == 0:
        raise ValueError("the dataset is empty")


def verdict_of(row: Row, score_column: str, category_column: str | None) -> Judgement:
    """A verdict from a row's own columns; without a score where the row has null.

    Errors: ValueError for a column that is not there, or holds anything but a score or category.
    """
    for name in filter(None, (score_column, category_column)):
        if name not in row:
            raise ValueError(f"has no column {name!r}; it has: {', '.join(map(str, row))}")
    score, category = row[score_column], None if category_column is None else row[category_column]
    if score is None:
        return Judgement(score=None, error=f"{score_column} is null")
    if isinstance(score, bool) or not isinstance(score, int | float) or score not in SCORES:
        raise ValueError(f"{score_column} must be a whole number from 1 to 5, got {score!r}")
    if category not in (None, NONE, *CATEGORIES):
        raise ValueError(f"{category_column} must be a policy category or none, got {category!r}")
    return Judgement(score=int(score), category=None if category == NONE else category)
