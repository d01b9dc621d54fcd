"""Settings of `safeshape score view`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ScoreViewConfig:
    """Write a page to look at scored answers, and a figure of the mean score against response progress.

    The page holds the text of your data, prompts and answers, because you ask for it here: share it as you would the
    data. It is one file that loads nothing else and works offline.
    """

    dataset_name: list[str] = option(help="scored datasets: JSONL or Parquet files, saved folders, or Hub ids")
    output: str | None = option(None, help="where to write the page (.html)")
    figure: str | None = option(None, help="where to write the figure (.png); .svg and .json are written beside it")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    group_by: str | None = option(None, help="figure: a column to group rows by, instead of by dataset")
    sort: Literal["risk", "lowest", "drop", "order"] = option(
        "risk",
        help="what comes first, on the page and within its limit: low scores at the end, low scores anywhere, "
        "large falls along the answer, or rows as they come",
    )
    limit: int = option(5000, help="rows on the page at most")
    seed: int = option(0, help="figure: seed of the bootstrap")

    def __post_init__(self) -> None:
        if self.output is None and self.figure is None:
            raise ValueError("output (a page) or figure must be given")
        if self.output is not None and not self.output.endswith((".html", ".htm")):
            raise ValueError(f"output must end in .html, got {self.output}")
        if self.figure is not None and not self.figure.endswith((".png", ".svg")):
            raise ValueError(f"figure must end in .png or .svg, got {self.figure}")
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
