"""Settings of `safeshape score export`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ScoreExportConfig:
    """Filter a scored dataset: drop answers that fall below a score, or keep only their safe beginning."""

    dataset_name: str = option(help="a scored dataset: a JSONL or Parquet file, a saved folder, or a Hub id")
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    drop_below: float | None = option(None, help="drop rows whose answer has a p_safe below this")
    by: Literal["min", "last"] | None = option(
        None,
        help="the score of an answer to drop by: its lowest along the way, or at its end; min, or with a calibration "
        "what it was fitted for",
    )
    keep_prefix: float | None = option(
        None,
        help="cut the answer before the first chunk with a p_safe below this; nothing left: dropped. A model trained "
        "on cut answers learns to stop there",
    )
    calibration: str | None = option(
        None,
        help="a calibration.json: rows that its threshold flags are dropped, and the other options read calibrated "
        "scores; the scores in the data stay as they are",
    )
    failed: Literal["drop", "keep"] = option("drop", help="what happens to rows that the scorer failed on")

    def __post_init__(self) -> None:
        if self.drop_below is None and self.keep_prefix is None and self.calibration is None:
            raise ValueError("drop_below, keep_prefix or calibration must be given")
        for name, value in (("drop_below", self.drop_below), ("keep_prefix", self.keep_prefix)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie within 0 and 1, got {value}")
