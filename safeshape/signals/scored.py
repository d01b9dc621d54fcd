"""Rows of a scored dataset: reading them, what their trajectory does, and cutting an answer to its safe beginning.

A trajectory is a step function: a position of the answer has the score of the span that contains it, and each span's
score speaks about the answer read up to the span's end.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safeshape.data import Message, answer_of, as_messages
from safeshape.signals.align import character_scores, read_safety
from safeshape.types import Score

By = Literal["last", "min"]
NOT_SCORED = "the row was not scored"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A conversation with its score; `answer` is its last message. A failed row may have no messages and no answer."""

    messages: tuple[Message, ...]
    answer: str
    score: Score


def scored(row: Mapping[str, Any]) -> Scored:
    """Read a row of a scored dataset. A row whose scorer failed keeps `p_safe` None and the reason.

    Errors: ValueError, without the row's number, for a score without a conversation and for spans outside the answer.
    """
    if "safety" not in row:
        raise ValueError("has no `safety` column; score the data first")
    row = copy.deepcopy(dict(row))  # reading ShareGPT rows renames keys in place
    safety = row["safety"] or {"error": NOT_SCORED}
    if not isinstance(safety, Mapping):
        raise ValueError(f"`safety` must be a mapping, got {type(safety).__name__}")
    failed = safety.get("error") is not None or (safety.get("p_safe") is None and not safety.get("spans"))
    try:
        answer, messages = answer_of(row), tuple(as_messages(row))
    except ValueError:
        if not failed:
            raise
        answer, messages = "", ()
    p_safe, spans = (None, []) if failed else read_safety(safety)
    character_scores(answer, spans, p_safe or 0.0)  # refuses spans that do not fit the answer
    return Scored(
        messages=messages,
        answer=answer,
        score=Score(
            signal=str(safety.get("signal") or "unknown"),
            p_safe=p_safe,
            spans=tuple(spans),
            scorer=dict(safety.get("scorer") or {}),
            error=str(safety.get("error") or "the scorer gave no score") if failed else None,
        ),
    )


def points(score: Score) -> tuple[float, ...]:
    """The scores along the answer: of its spans, or of the whole answer where the signal judged only that."""
    if score.p_safe is None:
        return ()
    return tuple(span.p_safe for span in score.spans) or (score.p_safe,)


def summary(score: Score, by: By) -> float | None:
    """One number for an answer: its `last` score (the answer read to its end) or the `min` along the way.

    None where the scorer failed.
    """
    return score.p_safe if by == "last" or score.p_safe is None else min(score.p_safe, *points(score))


def largest_drop(score: Score) -> float:
    """How far the score falls at most from any point to a later one; 0 where it never falls."""
    values = points(score)
    return max((top - p for top, p in zip(accumulate(values, max), values, strict=True)), default=0.0)


def turns_unsafe(score: Score) -> bool:
    """Whether the trajectory is at or above 0.5 somewhere and below 0.5 later."""
    values = points(score)
    return any(top >= 0.5 > p for top, p in zip(accumulate(values, max), values, strict=True))


def place_at(score: Score, length: int, grid_P: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of the score's `points` stands at shares of the answer, shape (P,): the first that ends there or later.

    `length`: characters of the answer. `grid_P`: in [0, 1]. What follows the last span belongs to it.
    """
    ends_S = np.array([span.end / length for span in score.spans] or [1.0])
    return np.minimum(np.searchsorted(ends_S, grid_P), len(ends_S) - 1)


def at_progress(score: Score, length: int, grid_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """The trajectory at shares of the answer, shape (P,). Errors: ValueError for a failed score."""
    if score.p_safe is None:
        raise ValueError("a failed score has no trajectory")
    return np.array(points(score))[place_at(score, length, grid_P)]


def safe_spans(score: Score, threshold: float) -> int:
    """How many of the score's `points` come before the first that falls below the threshold."""
    values = points(score)
    return next((index for index, p_safe in enumerate(values) if p_safe < threshold), len(values))


def cut(row: Mapping[str, Any], item: Scored, spans: int) -> dict[str, Any] | None:
    """A copy of the row with its last answer cut after its first `spans` spans, and its `safety` with it.

    Nothing else changes. The answer's `p_safe` becomes that of its last span: the guard's verdict on exactly this text.
    None when nothing but blanks is left; an answer that was judged only as a whole leaves nothing.
    """
    answer = item.answer[: item.score.spans[spans - 1].end] if spans and item.score.spans else ""
    if not answer.strip():
        return None
    found: dict[str, Any] = copy.deepcopy(dict(row))
    safety = found["safety"]
    kept = safety["spans"][:spans]
    found["safety"] = {**safety, "p_safe": kept[-1]["p_safe"], "spans": kept}
    for column in ("messages", "conversations", "completion"):
        if isinstance(found.get(column), list):
            last = found[column][-1]
            last["content" if "content" in last else "value"] = answer
            return found
    found["completion"] = answer
    return found
