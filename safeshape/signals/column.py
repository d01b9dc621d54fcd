"""The `safety` column: scored data is an ordinary dataset that can be saved, looked at and reused.

Scoring has two passes over the rows. The first asks a scorer for every conversation that the store does not know and
puts each score there as it arrives; the second reads the rows again and sets the stored scores beside them. So a run
that was killed goes on where it was, memory does not grow with the data, and any engine gives the same file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset

from safeshape.data import Message, answer_of, as_messages
from safeshape.signals.calibration import Calibration
from safeshape.store import Store, content_key
from safeshape.types import Score

Row = Mapping[str, Any]
Rows = Callable[[], Iterable[Row]]  # starts from the first row each time it is called
Scorer = Callable[[Iterable[Sequence[Message]]], Iterator[Score]]  # in order, one score a conversation
Engine = Callable[[Iterable[tuple[str, Sequence[Message]]]], Iterator[tuple[str, Score]]]  # by key, in any order
Progress = Callable[[int, int], None]
WINDOW = 256  # rows held at once


@dataclass(kw_only=True)
class Outcome:
    """What happened to the rows of a run. `scored`: scorer calls, `reused`: rows whose score was there already.

    `failed`: rows without a score, `first_failure`: the first of them with its reason. `unsafe`: rows with p_safe
    below 0.5. `reasons`: why a conversation has no score, by its key.
    """

    rows: int = 0
    scored: int = 0
    reused: int = 0
    failed: int = 0
    unsafe: int = 0
    first_failure: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def conversation_of(row: Row) -> list[Message]:
    """The conversation that is scored. Errors: ValueError in one sentence, without the row's number."""
    answer_of(row)
    messages = as_messages(row)
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a message holds half a character (a lone surrogate), which no model reads") from error
    except TypeError as error:
        raise ValueError(f"a message holds more than text: {error}") from error
    return messages


def key_of(messages: Sequence[Message], maker: Mapping[str, Any]) -> str:
    """Where a conversation's score is kept: a hash of its messages and of everything that makes the score."""
    return content_key([{k: v for k, v in m.items() if v is not None} for m in messages], maker)


def as_column(score: Score) -> dict[str, Any]:
    """A score as it stands in the column: `{"signal", "p_safe", "spans", "scorer", "error"}`."""
    spans = [(span.start, span.end, span.p_safe) for span in score.spans]
    return _column({"signal": score.signal, "p_safe": score.p_safe, "spans": spans}, score.scorer, score.error)


def _column(stored: Mapping[str, Any], scorer: Mapping[str, Any], error: str | None = None) -> dict[str, Any]:
    # By hand: `asdict` copies deeply, which takes longer than all else where answers have hundreds of spans.
    return {
        "signal": stored["signal"],
        "p_safe": stored["p_safe"],
        "spans": [{"start": start, "end": end, "p_safe": p_safe} for start, end, p_safe in stored["spans"]],
        "scorer": dict(scorer),
        "error": error,
    }


def safety_type(scorer: Mapping[str, Any]) -> pa.DataType:
    """The type of the column in tables, the same whether or not a row failed."""
    span = pa.struct([("start", pa.int64()), ("end", pa.int64()), ("p_safe", pa.float64())])
    fields = [("signal", pa.string()), ("p_safe", pa.float64()), ("spans", pa.list_(span))]
    return pa.struct([*fields, ("scorer", pa.infer_type([scorer])), ("error", pa.string())])


def _windows(rows: Iterable[Row]) -> Iterator[list[tuple[int, Row]]]:
    numbered = enumerate(rows)
    while window := list(islice(numbered, WINDOW)):
        yield window


def _keyed(window: Sequence[tuple[int, Row]], maker: Mapping[str, Any]) -> list[tuple[list[Message], str] | ValueError]:
    """The conversation and key of each row, or why it has none."""
    found: list[tuple[list[Message], str] | ValueError] = []
    for _, row in window:
        try:
            messages = conversation_of(row)
            found.append((messages, key_of(messages, maker)))
        except ValueError as error:
            found.append(error)
    return found


def fill(
    rows: Rows,
    engine: Engine,
    store: Store,
    *,
    maker: Mapping[str, Any],
    keep_failures: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Put the score of every conversation into the store, asking the engine only for those that are not there.

    `maker`: everything that makes a score; another value never finds an old score. Equal conversations are scored once.
    A failure is never stored: the next run tries it again. `progress` is called with the number of rows read.
    Errors: ValueError that names the row when one fails and `keep_failures` is False, or says that there are no rows.
    """
    outcome, asked = Outcome(), {}

    def missing() -> Iterator[tuple[str, list[Message]]]:
        for window in _windows(rows()):
            keyed = _keyed(window, maker)
            there = store.get_many("scores", [entry[1] for entry in keyed if isinstance(entry, tuple)])
            for (index, _), entry in zip(window, keyed, strict=True):
                outcome.rows += 1
                if isinstance(entry, ValueError):
                    if not keep_failures:
                        raise ValueError(f"row {index}: {entry}") from entry
                elif entry[1] in there:
                    outcome.reused += 1
                elif entry[1] not in asked and entry[1] not in outcome.reasons:
                    asked[entry[1]] = index
                    there[entry[1]] = None  # for equal rows of this window
                    yield entry[1], entry[0]
            progress(outcome.rows)

    for key, score in engine(missing()):
        index = asked.pop(key)
        if score.p_safe is None:
            outcome.reasons[key] = score.error or "the scorer gave no reason"
            if not keep_failures:
                raise ValueError(f"row {index}: {outcome.reasons[key]}")
        else:
            spans = [[span.start, span.end, span.p_safe] for span in score.spans]
            store.put_many("scores", {key: {"signal": score.signal, "p_safe": score.p_safe, "spans": spans}})
            outcome.scored += 1
    if outcome.rows == 0:
        raise ValueError("the dataset is empty")
    return outcome


def scored_rows(
    rows: Rows,
    store: Store,
    *,
    maker: Mapping[str, Any],
    scorer: Mapping[str, Any],
    outcome: Outcome,
    signal: str = "star",
    calibration: Calibration | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows in their order, each with its `safety`; an existing column of that name gives way.

    A row without a score has `p_safe` null and its reason as `error`; `outcome` counts these. `scorer`: who made the
    scores, as it stands in the data. `signal`: of rows without a score. `calibration`: maps the scores that are
    written, and stands in the scorer's identity; the store keeps them as the scorer gave them.
    Errors: ValueError when a row is not the one that was scored.
    """
    if calibration is not None:
        calibration.check(scorer)
        scorer = {**scorer, "calibration": calibration.sha256}
    for window in _windows(rows()):
        keyed = _keyed(window, maker)
        there = store.get_many("scores", [entry[1] for entry in keyed if isinstance(entry, tuple)])
        for (index, row), entry in zip(window, keyed, strict=True):
            if isinstance(entry, tuple) and entry[1] in there:
                stored = there[entry[1]] if calibration is None else _mapped(there[entry[1]], calibration)
                outcome.unsafe += stored["p_safe"] < 0.5
                yield {**row, "safety": _column(stored, scorer)}
                continue
            reason = str(entry) if isinstance(entry, ValueError) else outcome.reasons.get(entry[1])
            if reason is None:
                raise ValueError(f"row {index} changed while the dataset was scored")
            outcome.failed += 1
            outcome.first_failure = outcome.first_failure or f"row {index}: {reason}"
            nothing = {"signal": signal, "p_safe": None, "spans": ()}
            yield {**row, "safety": _column(nothing, scorer, reason)}


def _mapped(stored: Mapping[str, Any], calibration: Calibration) -> dict[str, Any]:
    spans = [(start, end, calibration.apply(p_safe)) for start, end, p_safe in stored["spans"]]
    return {**stored, "p_safe": calibration.apply(stored["p_safe"]), "spans": spans}


def score_dataset(dataset: Dataset, scorer: Scorer, *, progress: Progress = lambda done, total: None) -> Dataset:
    """The dataset with a `safety` column of `{"signal", "p_safe", "spans", "scorer"}` beside its own columns.

    Spans are character offsets into the last assistant message. An existing `safety` column is replaced. The first row
    that fails ends it. Nothing is stored: for data that outgrows memory, or runs that may be killed, there is
    `safeshape score`. Errors: ValueError that names the row without a usable conversation, or says that the dataset is
    empty.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")

    for index, row in enumerate(dataset):  # what cannot be scored is refused before any work is done
        try:
            conversation_of(row)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
    column: list[dict[str, Any]] = []
    for score in scorer(conversation_of(row) for row in dataset):
        if score.p_safe is None:
            raise ValueError(f"row {len(column)}: {score.error}")
        column.append(as_column(score))
        progress(len(column), len(dataset))
    if "safety" in dataset.column_names:
        dataset = dataset.remove_columns("safety")
    return dataset.add_column("safety", column)
