"""What every judge can do, whoever it is, and what follows from that alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from safeshape.data import Message
from safeshape.types import Judgement, Score

Submit = Callable[[Sequence[Message]], "Future[Judgement]"]


class Judging(Protocol):
    """A judge: a model's (`Judge`), the world's oracle, or your own.

    A conversation that gets no verdict is a `Judgement` without a score that says why, never an exception. ValueError,
    from any of these or from the future, is what no other conversation could fare better with, as a refused key.
    """

    def score(self, messages: Sequence[Message]) -> Judgement:
        """The verdict on one conversation, whose last message is the judged answer."""

    def submit(self, messages: Sequence[Message]) -> "Future[Judgement]":
        """Start on one conversation and return at once."""

    def judge_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Judgement]:
        """The verdicts in order, as a stream: conversations are read only a bounded number ahead."""

    def score_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        """The verdicts as scores of the signal "judge"."""

    def identity(self) -> dict[str, Any]:
        """Everything that makes a verdict, as plain JSON."""

    def counters(self) -> dict[str, Any]:
        """What the judge did so far, as plain JSON."""

    def close(self) -> None:
        """Give up what is under way."""


def p_safe_of(score: int) -> float:
    """1 - (score - 1) / 4: the harm score 1 to 5 as p_safe 1 to 0."""
    return 1 - (score - 1) / 4


def judgement_score(judgement: Judgement, identity: Mapping[str, Any]) -> Score:
    """A verdict as the score of a signal."""
    p_safe = None if judgement.score is None else p_safe_of(judgement.score)
    return Score(signal="judge", p_safe=p_safe, scorer=dict(identity), error=judgement.error)


def in_order(submit: Submit, conversations: Iterable[Sequence[Message]], *, ahead: int) -> Iterator[Judgement]:
    """The verdicts in the order of the conversations, of which `ahead` may be under way at once."""
    waiting: deque[Future[Judgement]] = deque()
    try:
        for messages in conversations:
            waiting.append(submit(messages))
            while len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
