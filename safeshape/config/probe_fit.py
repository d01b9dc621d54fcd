"""Settings of `safeshape probe fit`."""

from dataclasses import field as made_by
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option
from safeshape.config.probe_data import PromptSet


def numbers(value: Any) -> Any:
    """Layers as they are typed: one number, several, or a word."""
    given = [value] if isinstance(value, str | int) and not isinstance(value, bool) else value
    return [str(one) for one in given] if isinstance(given, list) else given


def layers_of(layers: list[str]) -> list[int] | str:
    """`all`, `auto`, or numbers. Errors: ValueError for anything else."""
    if len(layers) == 1 and layers[0] in ("all", "auto"):
        return layers[0]
    try:
        return [int(one) for one in layers]
    except ValueError as error:
        raise ValueError(f"layers must be numbers, all or auto, got {' '.join(layers)!r}") from error


@dataclass(config=STRICT, kw_only=True)
class ProbeFitConfig:
    """Fit an activation probe to labelled prompts and write it with a card of how it did on what was left out.

    Give either --dataset_name, or --harmful and --harmless files, or `datasets` in a YAML file.
    """

    model: str = option(help="the model to read: a folder, a Hub id, or world:llama")
    output_dir: str = option(help="folder for the probe (probe.json, probe.safetensors)")
    dataset_name: str | None = option(None, help="rows with `prompt` or `messages`, and a label")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    label_column: str = option("label", help="dataset_name: column that is true, 1, harmful or unsafe where harmful")
    group_column: str | None = option(None, help="dataset_name: where a row comes from; groups are left out whole")
    harmful: list[str] = made_by(default_factory=list, metadata={"help": "files of harmful prompts, a group each"})
    harmless: list[str] = made_by(default_factory=list, metadata={"help": "files of harmless prompts, a group each"})
    field: str = option("prompt", help="harmful, harmless: the column with the prompt")
    datasets: list[PromptSet] = made_by(
        default_factory=list, metadata={"help": "sets of prompts, in the YAML file; see docs/probes.md"}
    )
    data_folder: str = option(".", help="datasets: the folder that their paths start from")
    max_per_dataset: int | None = option(None, help="at most so many prompts of each set, drawn by the seed")
    layers: list[str] = made_by(
        default_factory=lambda: ["auto"],
        metadata={"help": "numbers (0: embedding, -1: last), all, or auto: chosen by leaving groups out"},
    )
    pooling: Literal["last", "mean", "auto"] = option("auto", help="over tokens: the last one, their mean, or chosen")
    layer_pooling: Literal["concat", "mean", "learned"] = option(
        "concat", help="over layers: side by side, their mean, or learned weights; auto layers choose by themselves"
    )
    C: float | None = option(None, help="inverse strength of regularisation (default: cross-validated)")
    calibrate: bool = option(True, help="false: leave the log odds as the regression gives them")
    batch_size: int = option(64, help="prompts per forward")
    device: str = option("cpu", help="torch device of the model")
    dtype: str = option("float32", help="torch dtype of the model")
    revision: str = option("main", help="revision of the model on the Hub")
    store: str | None = option(None, help="file that keeps features (default: none; they are read anew)")
    seed: int = option(0, help="seed of folds and draws")

    @field_validator("layers", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return numbers(value)

    def __post_init__(self) -> None:
        layers_of(self.layers)
        given = [bool(self.dataset_name), bool(self.harmful or self.harmless), bool(self.datasets)]
        if sum(given) != 1:
            raise ValueError("give either dataset_name, or harmful and harmless, or datasets")
        if bool(self.harmful) != bool(self.harmless):
            raise ValueError("harmful and harmless files are both needed")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.max_per_dataset is not None and self.max_per_dataset < 1:
            raise ValueError(f"max_per_dataset must be at least 1, got {self.max_per_dataset}")
        if self.C is not None and not self.C > 0:
            raise ValueError(f"C must be above 0, got {self.C}")
