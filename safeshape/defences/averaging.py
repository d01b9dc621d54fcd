"""An average of the weights along the way, which is what comes out at the end."""

from collections.abc import Mapping

import torch
from torch import nn

from safeshape.defences.records import Defence, within
from safeshape.defences.stepping import Gradients, Loop, Stepper


class Averaging(Stepper):
    """After each update: average = decay * average + (1 - decay) * weights, from the starting weights on."""

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.average: Gradients = {}

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """The average begins at the starting weights."""
        # In float32: half precision would round away most of the share 1 - decay of each step.
        self.average = {name: value.detach().float().clone() for name, value in parameters.items()}

    def after(self, loop: Loop) -> None:
        """Take one more point into the average."""
        for name, value in loop.parameters.items():
            self.average[name].lerp_(value.detach().to(self.average[name]), 1 - self.decay)

    def state(self) -> Gradients:
        """The average."""
        return self.average

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the average back."""
        self.average = dict(state)

    def finish(self, model: nn.Module) -> None:
        """The average becomes the model's weights."""
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in self.average:
                    value.copy_(self.average[name])


def ema(*, decay: float = 0.99) -> Defence:
    """Parameter EMA (COLM 2025, arXiv 2508.12531): the average of the weights is what is kept.

    With `decay` 0 it is plain fine-tuning.
    """
    within("decay", decay, 0, 1)
    return Defence(
        name="ema",
        stage="fine-tuning",
        source="arXiv 2508.12531",
        differs="the default of decay is ours; gradients are taken at the weights, not at their average",
        stepper=lambda context: Averaging(decay=decay),
    )
