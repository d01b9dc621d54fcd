"""Rows of a scored dataset for the verbs that look at it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def scored_rows(name: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """The rows of a dataset in order. JSON lines are read one by one, as written; anything else as for training.

    As written matters: the dataset reader turns dates into timestamps and refuses lone surrogates.
    Errors: ValueError that names the file, and its line where one is not a JSON object.
    """
    if not is_json_lines(name):
        from safeshape.sources import read_dataset

        yield from read_dataset(name, split)
        return
    from safeshape.data import json_lines

    for _, row in json_lines(name):
        yield row


def is_json_lines(name: str) -> bool:
    """Whether the dataset is a file of JSON lines."""
    return Path(name).suffix == ".jsonl" and Path(name).is_file()


def rows_sha256(rows: Iterable[dict[str, Any]]) -> str:
    """A SHA-256 over rows in order, with their columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
