"""Settings of `safeshape defences`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class DefencesConfig:
    """List the defences with what they cost and need, or measure what they cost."""

    action: Literal["list", "measure"] = option(
        "list", help="list: the table; measure: time every defence on the world"
    )
    output: str | None = option(None, help="JSON file: list writes the table there as well, measure its figures")
    costs: str | None = option(None, help="list: a file of `measure` in place of the shipped figures")
    family: Literal["llama", "qwen3", "phi3"] = option("llama", help="measure: which model of the embedded world")
    steps: int = option(20, help="measure: updates per defence")
    batch_size: int = option(8, help="measure: rows per update")
    seed: int = option(0, help="measure: seed of data and training")
    repeats: int = option(3, help="measure: runs per defence, of which the median counts")
    only: list[str] | None = option(None, help="measure: these defences instead of all")

    def __post_init__(self) -> None:
        if self.action == "measure" and self.output is None:
            raise ValueError("output must be given to measure")
        if self.action == "measure" and self.costs is not None:
            raise ValueError("costs is for list; measure writes to output")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
