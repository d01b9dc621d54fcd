"""The `safety` column: scored data is an ordinary dataset that can be saved, looked at and reused."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from datasets import Dataset

from safeshape.data import Message, answer_of, as_messages
from safeshape.types import Score

Scorer = Callable[[Iterable[Sequence[Message]]], Iterator[Score]]


def score_dataset(
    dataset: Dataset, scorer: Scorer, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Dataset:
    """The dataset with a `safety` column of `{"signal", "p_safe", "spans", "scorer"}` beside its own columns.

    Spans are character offsets into the last assistant message. An existing `safety` column is replaced.
    Errors: ValueError that names the row without a usable conversation, or says that the dataset is empty.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    conversations: list[list[Message]] = []
    for index, row in enumerate(dataset):
        try:
            answer_of(row)
            conversations.append(as_messages(row))
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
    column: list[dict[str, Any]] = []
    for score in scorer(conversations):
        column.append({**asdict(score), "spans": [asdict(span) for span in score.spans]})
        progress(len(column), len(dataset))
    if "safety" in dataset.column_names:
        dataset = dataset.remove_columns("safety")
    return dataset.add_column("safety", column)
