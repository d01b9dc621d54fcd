"""A stream of conversations through a scorer: windows of rows share forwards, rows fail one by one.

Shape suffixes: S partial answers, N sequences (one for each read of a partial answer), K label tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from safeshape.data import Message
from safeshape.signals.partials import Branch, Partials
from safeshape.signals.prefix import NaiveScorer, PrefixScorer
from safeshape.signals.refine import Refine, RefineReport, filled, wanted
from safeshape.signals.shared_attention import Trunk

Scorer = PrefixScorer | NaiveScorer
OnError = Literal["stop", "keep"]


@dataclass(kw_only=True)
class Trajectory:
    """One conversation on its way: chunk ends, their scores so far, and its error once it has failed."""

    index: int
    partials: Partials | None = None
    ends: Sequence[int] = ()
    scored: dict[int, float] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    error: str | None = None


Prepare = Callable[[Sequence[Message]], tuple[Partials, Sequence[int]]]
Read = Callable[[torch.Tensor], torch.Tensor]


def trajectories(
    conversations: Iterable[Sequence[Message]],
    scorer: Scorer,
    prepare: Prepare,
    read: Read,
    *,
    refine: Refine | None = None,
    report: RefineReport | None = None,
    on_error: OnError = "stop",
    window: int = 64,
    window_tokens: int = 32768,
) -> Iterator[Trajectory]:
    """The scores of every conversation's chunk ends, in order.

    `prepare` turns a conversation into its partial answers and chunk ends; `read` turns label logits (N, K) into p_safe
    (S,). Up to `window` rows or `window_tokens` tokens are held open together, so that short rows share forwards.
    Errors: with `on_error="stop"`, ValueError as `row 3: ...`, after all rows before it were given; with "keep" the row
    is given with its error and the stream goes on.
    """
    if on_error not in ("stop", "keep"):
        raise ValueError(f"on_error must be stop or keep, got {on_error!r}")
    held: list[Trajectory] = []
    tokens = 0
    for index, messages in enumerate(conversations):
        row = Trajectory(index=index)
        try:
            row.partials, row.ends = prepare(messages)
            scorer.check_length(len(row.partials.ids))
            tokens += len(row.partials.ids)
        except ValueError as error:
            row.error = str(error)
        held.append(row)
        if len(held) >= window or tokens >= window_tokens or (row.error and on_error == "stop"):
            yield from _finished(held, scorer, read, refine, report, on_error)
            held, tokens = [], 0
    yield from _finished(held, scorer, read, refine, report, on_error)


def _finished(
    held: Sequence[Trajectory],
    scorer: Scorer,
    read: Read,
    refine: Refine | None,
    report: RefineReport | None,
    on_error: OnError,
) -> Iterator[Trajectory]:
    alive = [row for row in held if row.error is None]
    trunks = dict(zip([row.index for row in alive], scorer.open_many([ids_of(row) for row in alive]), strict=True))
    _score(alive, trunks, scorer, read, refine)
    for row in alive:
        row.values = filled(row.scored, len(row.ends)) if row.error is None else []
    if refine is not None and report is not None:
        for row in alive:
            if row.error is None:
                report.add(row.scored, len(row.ends))
        _check([row for row in alive if row.error is None], trunks, scorer, read, refine, report)
    for row in held:
        if row.error is not None and on_error == "stop":
            raise ValueError(f"row {row.index}: {row.error}")
        yield row


def ids_of(row: Trajectory) -> Sequence[int]:
    """The tokens of a row's full answer, its trunk."""
    return row.partials.ids if row.partials is not None else ()


def _score(
    rows: Sequence[Trajectory], trunks: dict[int, Trunk], scorer: Scorer, read: Read, refine: Refine | None
) -> None:
    """Score each row's ends, round by round; one forward serves the branches of many rows."""
    while True:
        asked: list[tuple[Trajectory, list[int], list[Branch]]] = []
        for row in rows:
            picked = wanted(row.scored, len(row.ends), refine) if row.error is None else []
            if not picked or row.partials is None:
                continue
            branches = row.partials.branches([row.ends[at] for at in picked])
            try:
                scorer.check_length(max(branch.kept + len(branch.ids) for branch in branches))
            except ValueError as error:
                row.error = str(error)
            else:
                asked.append((row, picked, branches))
        if not asked:
            return
        found = scorer.label_logits_many([(trunks[row.index], branches) for row, _, branches in asked])
        for (row, picked, _), logits_NK in zip(asked, found, strict=True):
            row.scored.update(zip(picked, read(logits_NK).tolist(), strict=True))


def _check(
    rows: Sequence[Trajectory],
    trunks: dict[int, Trunk],
    scorer: Scorer,
    read: Read,
    refine: Refine,
    report: RefineReport,
) -> None:
    """Score a sample of refined rows in full and note how far off they were."""
    picked = [row for row in rows if refine.check_every and row.index % refine.check_every == 0]
    copies = [Trajectory(index=row.index, partials=row.partials, ends=row.ends) for row in picked]
    _score(copies, trunks, scorer, read, None)
    for row, copy in zip(picked, copies, strict=True):
        if copy.error is None:
            report.check(row.values, [copy.scored[at] for at in range(len(row.ends))], refine.tolerance)
