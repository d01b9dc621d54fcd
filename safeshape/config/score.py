"""Settings of `safeshape score`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ScoreConfig:
    """Score every partial answer of a dataset with a guard (STAR) and write it with a `safety` column."""

    dataset_name: str = option(help="a JSONL, JSON, CSV or Parquet file, a saved dataset folder, or a Hub id")
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    guard: str = option("world", help="row of the guard table: world, llama-guard-3")
    guard_model: str | None = option(None, help="folder or Hub id of the guard's weights, where not the row's own")
    chunk: int = option(5, help="units per chunk")
    unit: Literal["words", "tokens"] = option("words", help="what a chunk counts")
    batch_size: int = option(64, help="prefixes per forward")
    device: str = option("cpu", help="torch device of the guard")

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.batch_size < 1:
            raise ValueError("chunk and batch_size must be at least 1")
