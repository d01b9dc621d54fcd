"""Rows of evaluation suites as they are published: CSV, JSON, JSON lines, Parquet, MMLU's zip, folders, or the Hub."""

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid, parquet

from safeshape.data import json_lines

Row = Mapping[str, Any]
_FIELD = 1 << 24  # characters in a cell; HarmBench's contexts are longer than the library's own bound


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where a suite lies on the Hub. `name`: a configuration; `split`; `part`: what its rows are a part of."""

    id: str
    split: str
    name: str | None = None
    part: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of one file or split. `where`: what to call it in messages; `part`: from its name or place."""

    where: str
    part: str
    rows: Sequence[Row]


def needs(found: Found, *columns: str) -> None:
    """Errors: ValueError that names the file, the column it lacks and those that are expected."""
    if not found.rows:
        raise ValueError(f"{found.where} holds no rows")
    for number, row in enumerate(found.rows):
        for column in columns:
            if column not in row:
                raise ValueError(
                    f"{found.where}: row {number} has no column {column!r}; expected columns: {', '.join(columns)}; "
                    f"it has: {', '.join(map(str, row))}"
                )


def text(found: Found, number: int, column: str) -> str:
    """A cell that must hold text. Errors: ValueError that names the file and the row."""
    value = found.rows[number][column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{found.where}: row {number}: {column} is empty or not text")
    return value


def read_file(path: Path) -> Found:
    """The rows of a file by its ending. Errors: ValueError that names the file, and its line where one is not JSON."""
    try:
        rows = _rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error
    except (csv.Error, json.JSONDecodeError, ArrowInvalid) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return Found(where=str(path), part=path.stem, rows=rows)


def _rows(path: Path) -> list[Row]:
    if path.suffix == ".csv":
        csv.field_size_limit(_FIELD)
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            rows: list[Row] = []
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}: line {reader.line_num} does not have the header's number of columns")
                rows.append(row)
            return rows
    if path.suffix == ".jsonl":
        return [row for _, row in json_lines(str(path))]
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError(f"{path} must hold a list of objects")
        return content
    if path.suffix == ".parquet":
        found: list[Row] = parquet.read_table(path).to_pylist()
        return found
    raise ValueError(f"{path}: unknown kind of file; known: .csv, .json, .jsonl, .parquet")


def read_headerless(path: Path, columns: Sequence[str]) -> Found:
    """A CSV file without a header. Errors: ValueError that names the file and a row of another length."""
    return Found(where=str(path), part=path.stem, rows=_headerless(path.read_bytes(), str(path), columns))


def _headerless(content: bytes, where: str, columns: Sequence[str]) -> list[Row]:
    csv.field_size_limit(_FIELD)
    rows: list[Row] = []
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8") from error
    for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""))):
        if not cells:
            continue
        if len(cells) != len(columns):
            raise ValueError(f"{where}: row {number} has {len(cells)} columns; expected: {', '.join(columns)}")
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def read_mmlu_zip(path: Path) -> list[Found]:
    """The test files of MMLU's archive: `data/test/SUBJECT_test.csv`, without headers; other files are passed over.

    Errors: ValueError that names the archive, or the file in it.
    """
    columns = ("question", "A", "B", "C", "D", "answer")
    found = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.startswith("data/test/") and name.endswith("_test.csv"):
                    subject, where = Path(name).stem.removesuffix("_test"), f"{path}: {name}"
                    found.append(Found(where=where, part=subject, rows=_headerless(archive.read(name), where, columns)))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a zip archive") from error
    if not found:
        raise ValueError(f"{path} holds no file data/test/SUBJECT_test.csv")
    return found


def read_hub(hub: Hub) -> Found:
    """A split of a dataset on the Hub. Errors: ValueError in one sentence when it cannot be had."""
    where = f"{hub.id} on the Hub" + (f" ({hub.name})" if hub.name else "")
    try:
        dataset = load_dataset(hub.id, hub.name, split=hub.split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"cannot load {where}: {' '.join(str(error).split())}") from error
    return Found(where=where, part=hub.part or hub.name or hub.split, rows=list(dataset))
