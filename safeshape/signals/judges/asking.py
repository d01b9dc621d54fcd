"""Where a judging model runs: what it is asked goes out as a `Question` and comes back as an `Answer`."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Question:
    """One try at one verdict. `told`: the rubric. `shown`: the fenced conversation. `tried`: how often before."""

    told: str
    shown: str
    tried: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote, or why there is nothing to read.

    `again`: asking anew may help. `notes`: how it came about, kept beside the verdict.
    """

    text: str | None = None
    error: str | None = None
    again: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


class Asking(Protocol):
    """A model that can be asked. `ahead`: how many questions it wants at once to be busy."""

    ahead: int

    def submit(self, question: Question) -> "Future[Answer]":
        """Start on a question. Errors, from the future: ValueError for what no other question could mend."""

    def identity(self) -> dict[str, Any]:
        """What the model is and how it is asked: stands in the data."""

    def maker(self) -> dict[str, Any]:
        """What else makes its answers, such as hashes of weights: stands in the store's keys."""

    def counters(self) -> dict[str, Any]:
        """What was asked and what it took."""

    def close(self) -> None:
        """Give up what is under way."""
