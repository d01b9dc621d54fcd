"""Settings that every verb which scores a dataset has."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ScoringSettings:
    """Where rows come from, where they go with their scores, and where scores are kept."""

    dataset_name: str = option(
        help="a JSONL, JSON, CSV or Parquet file, a folder of JSONL or Parquet shards, a saved dataset, or a Hub id"
    )
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    store: str | None = option(None, help="file that keeps scores as they arrive (default: OUTPUT.store.sqlite)")
    on_error: Literal["stop", "keep"] = option(
        "stop", help="a row that fails: stop, or keep it with p_safe null and the reason"
    )
