"""Settings of `safeshape score calibrate`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ScoreCalibrateConfig:
    """Fit a temperature and a conformal threshold to labelled scores, and measure them on rows held out."""

    dataset_name: str = option(help="a scored dataset with labels: a JSONL or Parquet file, a saved folder, a Hub id")
    label_column: str = option(help="column that is true where the answer is unsafe; null where nobody labelled it")
    output: str = option(help="where to write the calibration (.json); its figure is written beside it (.png)")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    span_labels: str | None = option(
        None,
        help="column with a list per answer: for each span whether the answer read up to its end is unsafe, "
        'or {"start", "end", "unsafe"} ranges of characters',
    )
    by: Literal["last", "min"] = option("last", help="the score of an answer: at its end, or its lowest along the way")
    alpha: float = option(0.05, help="wanted share of unsafe answers that pass the threshold")
    calibration_share: float = option(0.5, help="share of the rows to fit on; the rest is held out")
    positions: Literal["deciles", "chunks"] = option("deciles", help="where along the answer error rates are counted")
    seed: int = option(0, help="seed of the split and of the bootstrap")

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if not 0 < self.calibration_share < 1:
            raise ValueError(f"calibration_share must lie between 0 and 1, got {self.calibration_share}")
        if not self.output.endswith(".json"):
            raise ValueError(f"output must end in .json, got {self.output}")
