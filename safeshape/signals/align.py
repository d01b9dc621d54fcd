"""From spans over characters to scores over tokens, and from rows to rows the trainer can batch.

Characters are the common ground of a guard's tokenizer and the trained model's: a token takes the lowest score of the
characters it covers, so text that was called unsafe is never learned because a token reaches into its safe neighbour.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from safeshape.data import Turn, checked_p_safe, encode, render
from safeshape.types import IGNORE, Span

COLUMNS = ("input_ids", "labels", "p_safe", "answer_p_safe")


def character_scores(answer: str, spans: Sequence[Span], p_safe: float) -> NDArray[np.float64]:
    """The score of each character of an answer, shape (characters + 1,); the last entry is for the end of the turn.

    Blanks between two spans belong to the span after them; other characters outside every span take the whole
    answer's `p_safe`. The end-of-turn marker belongs to the last span.
    Errors: ValueError for spans outside the answer, empty, or overlapping.
    """
    scores = np.full(len(answer) + 1, p_safe)
    done = 0
    for span in spans:
        if not 0 <= span.start < span.end <= len(answer):
            raise ValueError(f"span [{span.start}, {span.end}) lies outside the answer of {len(answer)} characters")
        if span.start < done:
            raise ValueError(f"span [{span.start}, {span.end}) overlaps the one before it or is out of order")
        begin = done if not answer[done : span.start].strip() else span.start
        scores[begin : span.end] = span.p_safe
        done = span.end
    if spans and not answer[done:].strip():
        scores[done:] = spans[-1].p_safe
    return scores


def token_scores(
    offsets: Sequence[tuple[int, int]], turn: Turn, spans: Sequence[Span], p_safe: float
) -> list[tuple[int, float]]:
    """The tokens that a turn asks the model to produce, each with its score: pairs of token index and p_safe.

    A token counts when it begins inside the turn. Template text before the answer (an empty thinking block, say) takes
    the score of the answer's first character, the end-of-turn marker that of its last.
    """
    scores = character_scores(turn.answer, spans, p_safe)
    first = turn.answer_start - turn.stripped
    found = []
    for index, (start, end) in enumerate(offsets):
        if turn.start <= start < turn.end and end > start:
            low = min(max(start - first, 0), len(scores) - 1)
            high = min(max(end - first, low + 1), len(scores))
            found.append((index, float(scores[low:high].min())))
    return found


def read_safety(safety: Mapping[str, Any]) -> tuple[float, list[Span]]:
    """The score of the whole answer and its spans, from a row's `safety` column.

    Without a `p_safe` of its own the answer takes the score of its last span, as a partial answer read to the end.
    Errors: ValueError that names the field.
    """
    spans = [
        Span(
            start=_offset(span, "start"),
            end=_offset(span, "end"),
            p_safe=checked_p_safe(span.get("p_safe"), "span p_safe"),
        )
        for span in safety.get("spans") or ()
    ]
    whole = safety.get("p_safe")
    if whole is None and not spans:
        raise ValueError("`safety` has neither `p_safe` nor `spans`")
    return (spans[-1].p_safe if whole is None else checked_p_safe(whole, "safety p_safe")), spans


def _offset(span: Mapping[str, Any], name: str) -> int:
    value = span.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"span {name} must be a whole number, got {value!r}")
    return value


def training_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_signal: bool,
    max_length: int | None,
    overlong: str,
) -> dict[str, list[Any]]:
    """One row as token ids, labels and scores; every list has one entry per token.

    Errors: ValueError in one sentence, without the row's number.
    """
    safety = row.get("safety")
    if safety is None and needs_signal:
        raise ValueError("has no `safety` score, which this policy needs; score the data first")
    p_safe, spans = (1.0, []) if safety is None else read_safety(safety)
    rendered = render(row, tokenizer)
    ids, offsets = encode(rendered, tokenizer)
    labels, token_p_safe, answer_p_safe = [IGNORE] * len(ids), [0.0] * len(ids), [0.0] * len(ids)
    for turn in rendered.turns:
        whole = p_safe if turn.last else float(turn.p_safe or 0.0)
        for index, score in token_scores(offsets, turn, spans if turn.last else (), whole):
            labels[index], token_p_safe[index], answer_p_safe[index] = ids[index], score, whole
    if max_length is not None and len(ids) > max_length:
        if overlong == "refuse":
            raise ValueError(
                f"has {len(ids)} tokens, but max_length is {max_length}; raise max_length or set overlong to truncate"
            )
        if all(label == IGNORE for label in labels[1:max_length]):
            raise ValueError(f"has no token of its answer left after truncation to max_length {max_length}")
    columns: tuple[list[Any], ...] = (ids, labels, token_p_safe, answer_p_safe)
    return {name: values[:max_length] for name, values in zip(COLUMNS, columns, strict=True)}


def prepare(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_signal: bool,
    max_length: int | None,
    overlong: str = "refuse",
    name: str = "train",
) -> Dataset | IterableDataset:
    """Tokenise a dataset for the trainer: columns `input_ids`, `labels`, `p_safe`, `answer_p_safe`.

    `overlong`: "refuse" or "truncate" (keeps the start) for rows longer than `max_length` tokens.
    Errors: ValueError that names the row, as `train row 7: ...`, or says that the dataset is empty.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"the {name} dataset is empty")

    def convert(row: dict[str, Any], index: int) -> dict[str, list[Any]]:
        try:
            return training_row(row, tokenizer, needs_signal=needs_signal, max_length=max_length, overlong=overlong)
        except ValueError as error:
            raise ValueError(f"{name} row {index}: {error}") from error

    options: dict[str, Any] = {
        "with_indices": True,
        "remove_columns": dataset.column_names or list(next(iter(dataset))),
    }
    if isinstance(dataset, Dataset):
        options["desc"] = f"Aligning {name} data"
    return dataset.map(convert, **options)
