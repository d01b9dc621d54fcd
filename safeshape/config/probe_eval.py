"""Settings of `safeshape probe eval`."""

from dataclasses import field
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option
from safeshape.config.probe_data import PromptSet
from safeshape.config.probe_fit import layers_of, numbers


@dataclass(config=STRICT, kw_only=True)
class ProbeEvalConfig:
    """Measure activation probes as a sceptic would: data sets and categories left out, beside a bag of words.

    Sets and models stand in a YAML file: `safeshape probe eval --config recipes/probe/public.yaml --data_folder ...`.
    """

    model: list[str] = option(help="models to read, one report each: folders, Hub ids, or world:llama")
    output_dir: str = option(help="folder for results (probe-eval.json, .txt, .md and figures)")
    datasets: list[PromptSet] = option(help="sets of prompts, in the YAML file; see docs/probes.md")
    title: str = option("Probes", help="heading of probe-eval.md")
    data_folder: str = option(".", help="the folder that the paths of datasets start from")
    max_per_dataset: int = option(600, help="at most so many prompts of each set, drawn by the seed")
    layers: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "hidden states to choose from: all, or numbers (0: embedding, -1: last)"},
    )
    pooling: Literal["last", "mean", "auto"] = option("auto", help="over tokens: the last one, their mean, or chosen")
    threshold: float = option(0.5, help="a prompt is flagged when its p_safe is below this")
    batch_size: int = option(64, help="prompts per forward")
    device: str = option("cpu", help="torch device of the models")
    dtype: str = option("float32", help="torch dtype of the models")
    store: str | None = option(None, help="file that keeps features (default: OUTPUT_DIR/store.sqlite)")
    seed: int = option(0, help="seed of draws, splits, folds and intervals")

    @field_validator("layers", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return numbers(value)

    @field_validator("model", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def __post_init__(self) -> None:
        if layers_of(self.layers) == "auto":
            raise ValueError("layers names what can be chosen from: all, or numbers")
        if not self.model:
            raise ValueError("model must be given")
        names = [one.name for one in self.datasets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two datasets are called {name!r}")
        if {one.label for one in self.datasets if one.role == "train"} != {"harmful", "harmless"}:
            raise ValueError("datasets must hold harmful and harmless sets to fit on")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
        if self.batch_size < 1 or self.max_per_dataset < 10:
            raise ValueError("batch_size must be at least 1 and max_per_dataset at least 10")
