"""Settings of `safeshape probe score`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ProbeScoreConfig:
    """Score the requests of a dataset with an activation probe and write it with a `safety` column.

    A killed run goes on where it was when it is started again.
    """

    dataset_name: str = option(
        help="a JSONL, JSON, CSV or Parquet file, a folder of JSONL or Parquet shards, a saved dataset, or a Hub id"
    )
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    probe: str = option(help="folder of a probe, as `safeshape probe fit` writes it")
    model: str | None = option(None, help="where the probe's model is now, if not where it was fitted")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    batch_size: int = option(64, help="prompts per forward")
    device: str = option("cpu", help="torch device of the model")
    dtype: str = option("float32", help="torch dtype of the model")
    revision: str = option("main", help="revision of the model on the Hub")
    store: str | None = option(None, help="file that keeps scores as they arrive (default: OUTPUT.store.sqlite)")
    on_error: Literal["stop", "keep"] = option(
        "stop", help="a row that fails: stop, or keep it with p_safe null and the reason"
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
