"""Updates that are rounding noise, and what must wait until weights are sharded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GradientFloor(TrainerCallback):  # type: ignore[misc]
    """Skips updates whose gradient is rounding noise.

    At theta = theta_0 every KL gradient is zero; on a batch with nothing to learn only noise (norm about 1e-8) is left,
    and AdamW would rescale it to a full step. Below the floor all gradients are removed, so the optimizer does nothing.
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self.updates = 0
        self.skipped = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer after clipping and before the optimizer."""
        model: nn.Module = kwargs["model"]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.updates += 1
        if not gradients:
            return  # an engine that keeps its gradients to itself (DeepSpeed); there is nothing to look at
        norm = torch.nn.utils.get_total_norm(gradients)
        if float(norm.full_tensor() if isinstance(norm, DTensor) else norm) < self.floor:
            self.skipped += 1
            model.zero_grad(set_to_none=True)


class StartAfterSharding(TrainerCallback):  # type: ignore[misc]
    """Runs a function once the weights are shared out among the processes: only then can a sharded model run."""

    def __init__(self, start: Callable[[], None]) -> None:
        self.start = start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer when everything is prepared."""
        self.start()
