"""Reading a user's dataset from wherever it is, writing one, and refusing to write over another run."""

import datetime
import decimal
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet

from safeshape import world
from safeshape.data import answer_of

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_BATCH = 256  # rows held at once while reading or writing
RUN_FILES = ("safeshape.json", "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def read_dataset(name: str, split: str = "train") -> Dataset:
    """A dataset from a file, a saved dataset folder or the Hub.

    Errors: ValueError that names the file, and its line where one is not JSON.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"{name}: unknown kind of file; known: {', '.join(_READERS)}, or a saved dataset folder")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty")
        if path.suffix == ".jsonl" and not _begins_with_an_object(path):
            raise ValueError(_reason(path, ValueError("it does not begin with a JSON object")))
        try:
            return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(_reason(path, error)) from error
    if path.is_dir():
        try:
            found = load_from_disk(name)
        except FileNotFoundError as error:
            raise ValueError(f"{name} is a folder, but not a saved dataset") from error
        if isinstance(found, DatasetDict) and split not in found:
            raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(found)}")
        return found[split] if isinstance(found, DatasetDict) else found
    if path.suffix or name.startswith((".", "/")):
        raise ValueError(f"{name}: no such file or folder")
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load dataset {name!r} from the Hub: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that is read row by row, as often as needed, in memory that does not grow with it.

    `rows`: starts a new reading. `schema`: the types of its columns, where its form has them.
    """

    rows: Callable[[], Iterator[dict[str, Any]]]
    count: int
    schema: pa.Schema | None


def open_source(name: str, split: str = "train") -> Source:
    """A dataset to be streamed: JSONL and Parquet files, or folders of such shards in the order of their names.

    Other forms go through `read_dataset`, which maps them into memory from disk.
    Errors: ValueError that names the file, and its line where one is not JSON.
    """
    path = Path(name)
    shards = sorted(path.iterdir()) if path.is_dir() and not _is_saved(path) else [path] if path.is_file() else []
    for suffix, reader in ((".jsonl", _jsonl_source), (".parquet", _parquet_source)):
        found = [shard for shard in shards if shard.suffix == suffix]
        if found and len(found) == len([shard for shard in shards if not shard.name.startswith((".", "_"))]):
            return reader(found)
    dataset = read_dataset(name, split)
    schema: pa.Schema = dataset.features.arrow_schema
    return Source(rows=lambda: iter(dataset), count=len(dataset), schema=schema)


def _is_saved(path: Path) -> bool:
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _jsonl_source(shards: list[Path]) -> Source:
    for shard in shards:
        if shard.stat().st_size == 0:
            raise ValueError(f"{shard} is empty")
    count = 0
    for shard in shards:
        with shard.open("rb") as lines:
            count += sum(1 for line in lines if line.strip())
    return Source(rows=partial(_jsonl_rows, shards), count=count, schema=None)


def _jsonl_rows(shards: list[Path]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with shard.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not text.strip():
                    continue
                try:
                    row = json.loads(text.decode())
                except UnicodeDecodeError as error:
                    raise ValueError(f"{shard}: line {number} is not UTF-8") from error
                except json.JSONDecodeError as error:
                    raise ValueError(f"{shard}: line {number} is not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{shard}: line {number} is not a JSON object")
                yield row


def _parquet_source(shards: list[Path]) -> Source:
    count, schema = 0, None
    for shard in shards:
        try:
            found = parquet.read_metadata(shard)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"cannot read {shard}: {' '.join(str(error).split())}") from error
        count += found.num_rows
        columns = found.schema.to_arrow_schema()
        if schema is not None and not columns.equals(schema):
            raise ValueError(f"{shard} has other columns than {shards[0]}")
        schema = columns
    return Source(rows=partial(_parquet_rows, shards), count=count, schema=schema)


def _parquet_rows(shards: list[Path]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with parquet.ParquetFile(shard) as content:
            for batch in content.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()


def write_rows(output: str | Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None = None) -> None:
    """Write rows as they come: `output` ends in .jsonl or .parquet, or is a folder for `datasets.load_from_disk`.

    The result appears whole under its name or not at all. `schema`: the types of the columns, not needed for .jsonl;
    see `schema_of`. Errors: ValueError for a value that the form cannot hold, naming the row; or an existing `output`.
    """
    path = Path(output)
    if path.exists():
        raise ValueError(f"output {path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # one name: the next run clears what a killed one left
    _remove(part)
    try:
        if path.suffix == ".jsonl":
            _write_jsonl(part, rows)
        elif schema is None:
            raise ValueError(f"output {path} needs the types of its columns")
        elif path.suffix == ".parquet":
            _write_parquet(part, rows, schema)
        else:
            part.mkdir()
            _write_parquet(part / "rows.parquet", rows, schema)
            saved = Dataset.from_parquet(str(part / "rows.parquet"), cache_dir=str(part / "cache"))
            saved.save_to_disk(part / "saved")
            (part / "saved").replace(path)
            return
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _plain(value: object) -> object:
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise ValueError(f"a value of type {type(value).__name__} cannot be written as JSON")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("wb") as lines:
        for index, row in enumerate(rows):
            try:
                text = json.dumps(row, ensure_ascii=False, default=_plain)
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from error
            try:
                lines.write(text.encode() + b"\n")
            except UnicodeEncodeError:  # a lone surrogate survives only as an escape
                lines.write(json.dumps(row, default=_plain).encode() + b"\n")


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    with parquet.ParquetWriter(path, schema) as writer:
        for _, table in _tables(rows, schema):
            writer.write_table(table)


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None) -> Iterator[tuple[int, pa.Table]]:
    """Batches of rows as tables, each with the number of its first row."""
    waiting, start = iter(rows), 0
    while batch := list(islice(waiting, _BATCH)):
        names = list(dict.fromkeys(name for row in batch for name in row)) if schema is None else schema.names
        try:
            columns = [pa.array([row.get(name) for row in batch], _type_of(schema, name)) for name in names]
            yield start, pa.Table.from_arrays(columns, names=names) if schema is None else pa.table(columns, schema)
        except (pa.ArrowException, UnicodeEncodeError) as error:
            where, why = f"rows {start} to {start + len(batch) - 1}", " ".join(str(error).split())
            raise ValueError(f"{where} do not fit into one table ({why}); write .jsonl") from error
        start += len(batch)


def _type_of(schema: pa.Schema | None, name: str) -> pa.DataType | None:
    return None if schema is None else schema.field(name).type


def schema_of(rows: Iterable[Mapping[str, Any]]) -> pa.Schema:
    """The types of the columns that hold all rows; a column that some rows lack is null there.

    Errors: ValueError that names the rows whose types do not go together.
    """
    schema = pa.schema([])
    for start, table in _tables(rows, None):
        try:
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        except pa.ArrowException as error:
            why = " ".join(str(error).split())
            raise ValueError(f"row {start} and those after it have other types ({why}); write .jsonl") from error
    return schema


def with_column(schema: pa.Schema, name: str, kind: pa.DataType) -> pa.Schema:
    """The schema with one more column at its end, in place of one of that name."""
    if name in schema.names:
        schema = schema.remove(schema.names.index(name))
    wider = schema.append(pa.field(name, kind))
    if b"huggingface" not in (schema.metadata or {}):
        return wider
    # A saved dataset tells its own types there, class names for instance; they must know the new column too.
    features = Features.from_arrow_schema(schema)
    features.pop(name, None)
    features[name] = Features.from_arrow_schema(pa.schema([(name, kind)]))[name]
    return features.arrow_schema


def check_first_row(dataset: Dataset) -> None:
    """Errors: ValueError when the dataset is empty or its first row is not a conversation with an answer."""
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    try:
        answer_of(dataset[0])
    except ValueError as error:
        raise ValueError(f"row 0: {error}") from error


def _begins_with_an_object(path: Path) -> bool:
    """The reader takes lines of other JSON values as columns without a word, so the first line is looked at here."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        return next((line for line in lines if line.strip()), "").lstrip().startswith("{")


def _reason(path: Path, error: Exception) -> str:
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{path}: line {number} is not a JSON object"
            except json.JSONDecodeError as bad:
                return f"{path}: line {number} is not valid JSON: {bad}"
    return f"cannot read {path}: {' '.join(str(error.__cause__ or error).split())}"


def model_path(name: str) -> str:
    """A model's path or Hub id; `world:llama` names a model of the embedded world."""
    return world.path(name.removeprefix("world:")) if name.startswith("world:") else name


def refuse_used(folder: str | None) -> Path:
    """The output folder, if no other run is in it. Errors: ValueError that says what is there."""
    if not folder:
        raise ValueError("output_dir must be given")
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"output_dir {folder} is a file")
    used = [name for name in RUN_FILES if (path / name).exists()]
    used += sorted(child.name for child in path.glob("checkpoint-*"))
    if used:
        raise ValueError(
            f"output_dir {folder} already holds another run ({used[0]}); choose another folder, or give "
            "--resume_from_checkpoint to go on with it"
        )
    return path
