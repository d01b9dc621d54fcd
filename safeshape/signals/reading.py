"""What all guards share: conversations and chunk ends in, one score each out, in order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from safeshape.data import Message, answer_of
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.types import Score, Span

# A conversation and where the chunks of its last message end, as character offsets.
Item = tuple[Sequence[Message], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A conversation that a guard could not read, and why in one sentence."""

    reason: str


# p_safe of every partial answer, or why there is none.
Reading = list[float] | Failure


class Reader(Protocol):
    """A guard of any kind. `p_safe_at` reads partial answers; `identity` says what made a score."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]: ...

    def identity(self, chunk: int, unit: Unit) -> dict[str, Any]: ...


def items_of(
    conversations: Iterable[Sequence[Message]], *, chunk: int, unit: Unit, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Item]:
    """Each conversation with the chunk ends of its answer. Errors: ValueError that names it, as `row 3: ...`."""
    for index, messages in enumerate(conversations):
        try:
            yield messages, chunk_ends(answer_of({"messages": messages}), chunk, unit, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error


def score_of(ends: Sequence[int], reading: Reading, scorer: dict[str, Any]) -> Score:
    """The score of one conversation; a failure has no spans and no p_safe."""
    if isinstance(reading, Failure):
        return Score(signal="star", p_safe=None, scorer=scorer, error=reading.reason)
    starts = [0, *ends[:-1]]
    spans = tuple(Span(start=a, end=b, p_safe=p) for a, b, p in zip(starts, ends, reading, strict=True))
    return Score(signal="star", p_safe=spans[-1].p_safe, spans=spans, scorer=scorer)


def score_stream(
    reader: Reader,
    conversations: Iterable[Sequence[Message]],
    *,
    chunk: int,
    unit: Unit,
    batch_size: int,
    window: int,
) -> Iterator[Score]:
    """Score a stream of conversations in order; `window` conversations are read ahead and batched together."""
    scorer = reader.identity(chunk, unit)
    waiting = items_of(conversations, chunk=chunk, unit=unit, tokenizer=reader.tokenizer)
    while items := list(islice(waiting, window)):
        for (_, ends), reading in zip(items, reader.p_safe_at(items, batch_size=batch_size), strict=True):
            yield score_of(ends, reading, scorer)


def spans_of(reader: Reader, messages: Sequence[Message], *, chunk: int, unit: Unit) -> list[Span]:
    """The spans of one conversation. Errors: ValueError, also where a stream would hold a failure."""
    score = next(score_stream(reader, [messages], chunk=chunk, unit=unit, batch_size=64, window=1))
    if score.p_safe is None:
        raise ValueError(f"guard {reader.name!r}: {score.error}")
    return list(score.spans)


class Scoring:
    """`score` and `score_many` of guards that read by `p_safe_at`."""

    def score(self: Reader, messages: Sequence[Message], *, chunk: int = 5, unit: Unit = "words") -> list[Span]:
        """The score of every partial response of one conversation, as `Guard.score`."""
        return spans_of(self, messages, chunk=chunk, unit=unit)

    def score_many(
        self: Reader,
        conversations: Iterable[Sequence[Message]],
        *,
        chunk: int = 5,
        unit: Unit = "words",
        batch_size: int = 64,
        window: int = 64,
    ) -> Iterator[Score]:
        """Score a stream of conversations in order. One that cannot be read has p_safe None and says why."""
        return score_stream(self, conversations, chunk=chunk, unit=unit, batch_size=batch_size, window=window)
