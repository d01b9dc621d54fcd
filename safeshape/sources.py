"""Reading a user's dataset from wherever it is, and refusing to write over another run."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from safeshape import world
from safeshape.data import answer_of

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
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
