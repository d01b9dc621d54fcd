"""What a defence is: a value that says what happens to data, gradients and weights, and what it needs for that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

from safeshape.defences.stepping import Stepper

Stage = Literal["alignment", "before", "fine-tuning", "after", "inference"]
Need = Literal["base_model", "harmful_data", "safe_data", "scores"]
Trained = Literal["any", "lora", "full"]
Model: TypeAlias = PreTrainedModel | PeftModel


class NothingToTrain(ValueError):
    """A defence left no row of the user's to train on: the model stays as it is."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a defence may use beside the user's data.

    `start`: the aligned model as it was before fine-tuning, frozen; `run_defence` fills it in where a defence keeps it.
    `base`: the model before its alignment. `safe_data`: requests with the answers an aligned model gives, refusals of
    harmful ones among them. `harmful_data`: harmful requests with harmful answers. Both are rows as for training.
    `user_data`: the rows that are trained on, as `prepare` left them; `run_defence` fills it in.
    `resume`: whether an earlier run in the output folder goes on.
    `args`, `peft_config`: the settings of the fine-tuning run, for methods that train more than once.
    """

    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    peft_config: PeftConfig | None = None
    start: PreTrainedModel | None = None
    base: PreTrainedModel | None = None
    safe_data: Dataset | None = None
    harmful_data: Dataset | None = None
    user_data: Dataset | None = None
    resume: bool = False

    @property
    def user_rows(self) -> int | None:
        """How many rows are trained on, once they are prepared."""
        return None if self.user_data is None else len(self.user_data)

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))


@dataclass(frozen=True, kw_only=True)
class Defence:
    """A way to keep a model safe while it is fine-tuned.

    `source`: paper and equation. `differs`: where this departs from paper or released code. `scores_by`: which signals
    may score the data, where it needs scores. `trained`: which weights it works with: a LoRA adapter, all, or either.
    `keeps_start`: whether a copy of the starting weights is needed: for full fine-tuning, or under an adapter too.
    The parts, in the order in which they run; None where there is nothing to do:
    `before`: the weights before fine-tuning. `prepare`: the user's rows. `policy`: as for SafeTrainer. `freeze`: sets
    `requires_grad` before the optimizer is made. `stepper`: makes the gradients of every step, on the alignment data
    for the stage "alignment" and else on the user's. `alignment`: settings of that stage's run in place of the
    fine-tuning's. `callbacks`: of the trainer. `finish`: the weights after
    fine-tuning. `system_prompt`: what stands before every request once the model is served.
    """

    name: str
    stage: Stage
    source: str
    differs: str = ""
    needs: frozenset[Need] = frozenset()
    scores_by: tuple[str, ...] = ()
    trained: Trained = "any"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keeps_start: Literal["never", "full", "always"] = "never"
    before: Callable[[PreTrainedModel, Context], PreTrainedModel] | None = None
    prepare: Callable[[Dataset, Context], Dataset] | None = None
    policy: str | Mapping[str, Any] = "sft"
    freeze: Callable[[nn.Module, Context], None] | None = None
    stepper: Callable[[Context], Stepper] | None = None
    alignment: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Context], list[TrainerCallback]] | None = None
    finish: Callable[[Model, Context], Model] | None = None
    system_prompt: str | None = None


def required(value: Any, name: str, defence: str) -> Any:
    """The value. Errors: ValueError that names what the defence lacks."""
    if value is None:
        raise ValueError(f"defence {defence!r} needs {name.replace('_', ' ')}, and none is given")
    return value


def within(name: str, value: float, low: float, high: float) -> None:
    """Errors: ValueError for a value that is no number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value!r}")


def whole_number(name: str, value: object, low: int = 1) -> None:
    """Errors: ValueError for anything but a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(seed)
