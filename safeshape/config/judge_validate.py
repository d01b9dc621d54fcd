"""Settings of `safeshape judge validate`."""

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.judge import JudgeSettings, judge_kind
from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class JudgeValidateConfig(JudgeSettings):
    """Measure a judge on labelled rows: agreement, its errors by category, a second judge, other wordings."""

    dataset_name: str = option(help="a dataset with labels: a JSONL or Parquet file, a saved folder, or a Hub id")
    output: str = option(help="where to write the figures (.json)")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    label_column: str | None = option(None, help="column with what is true; null where nobody labelled the row")
    label_kind: Literal["unsafe", "score"] = option(
        "unsafe", help="label_column: true or 1 where the answer is unsafe; or scores from 1 to 5"
    )
    oracle: bool = option(False, help="true: the embedded world's oracle labels its rows, in place of label_column")
    category_column: str | None = option(None, help="column with the true policy category, or none")
    threshold: int = option(4, help="an answer counts as unsafe from this score on")
    second_judge: str | None = option(None, help="another judge, named like the first; settings are shared")
    second_model: str | None = option(None, help="second_judge behind a server: its name there")
    variants: list[str] = field(
        default_factory=list,
        metadata={"help": "rubrics that say the same in other words, or all: how often do verdicts change?"},
    )
    bootstrap: int = option(1000, help="resamples for intervals of what is no share")
    resample_seed: int = option(0, help="seed of the bootstrap")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kinds(self.judge, *([] if self.second_judge is None else [self.second_judge]))
        if self.second_model is not None and (self.second_judge is None or judge_kind(self.second_judge) != "server"):
            raise ValueError("second_model needs a second_judge behind a server")
        if (self.label_column is None) == (not self.oracle):
            raise ValueError("give either label_column or oracle true")
        if self.oracle and self.category_column is not None:
            raise ValueError("the oracle names categories itself; leave out category_column")
        if not 2 <= self.threshold <= 5:
            raise ValueError(f"threshold must be 2 to 5, got {self.threshold}")
        if self.bootstrap < 100:
            raise ValueError(f"bootstrap must be at least 100, got {self.bootstrap}")
        if not self.output.endswith(".json"):
            raise ValueError(f"output must end in .json, got {self.output}")
