"""Lisa: turns of alignment and user steps, each tied to where the other left off."""

from collections.abc import Mapping

import torch
from torch import nn

from safeshape.defences.records import Defence, whole_number, within
from safeshape.defences.stepping import Gradients, Loop, Stepper, add_gradients


class Alternating(Stepper):
    """`align_steps` steps on alignment data, `user_steps` on the user's, and so on, with a pull to the other's end.

    The gradient of rho/2 * ||w - w_other||^2 is rho * (w - w_other); it is added before clipping, as in a loss.
    """

    def __init__(self, *, rho: float, align_steps: int, user_steps: int, warm_up: float) -> None:
        self.rho, self.align_steps, self.user_steps, self.warm_up = rho, align_steps, user_steps, warm_up
        self._ends: dict[str, Gradients] = {}

    def aligning(self, step: int) -> bool:
        """Whether this step is on alignment data."""
        return step % (self.align_steps + self.user_steps) < self.align_steps

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Both turns begin at the starting weights."""
        for turn in ("align", "user"):
            self._ends[turn] = {name: value.detach().clone() for name, value in parameters.items()}

    def gradients(self, loop: Loop) -> torch.Tensor:
        """The gradient of this turn's loss plus the pull."""
        aligning = self.aligning(loop.step)
        loss = loop.safe() if aligning else loop.user()
        if loop.step <= self.warm_up * loop.total_steps or not self.rho:  # the released code's comparison
            return loss
        other = self._ends["user" if aligning else "align"]
        gaps = {name: value.detach() - other[name] for name, value in loop.parameters.items()}
        add_gradients(loop, {name: self.rho * gap for name, gap in gaps.items()})
        squares = torch.stack([gap.float().square().sum() for gap in gaps.values()]).sum()
        return loss + self.rho / 2 * squares

    def after(self, loop: Loop) -> None:
        """Remember where a turn ended. `loop.step` is the number of the step that comes next."""
        if self.aligning(loop.step) != self.aligning(loop.step - 1):
            ended = "align" if self.aligning(loop.step - 1) else "user"
            self._ends[ended] = {name: value.detach().clone() for name, value in loop.parameters.items()}

    def state(self) -> Gradients:
        """Both ends."""
        return {f"{turn}/{name}": value for turn, values in self._ends.items() for name, value in values.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take both ends back."""
        for name, value in state.items():
            turn, _, parameter = name.partition("/")
            self._ends[turn][parameter] = value


def lisa(*, rho: float = 1.0, align_steps: int = 100, user_steps: int = 900, warm_up: float = 0.1) -> Defence:
    """Lisa (NeurIPS 2024, arXiv 2405.18641, algorithm 1): bi-state optimisation with a proximal term.

    Defaults are the released code's; `warm_up` is the share of all steps before the proximal term begins. While it
    takes a step on alignment data, the user's batch of that step is passed over, as in the released code.
    """
    within("rho", rho, 0, float("inf"))
    within("warm_up", warm_up, 0, 1)
    whole_number("align_steps", align_steps)
    whole_number("user_steps", user_steps)
    return Defence(
        name="lisa",
        stage="fine-tuning",
        source="Lisa, arXiv 2405.18641, algorithm 1",
        differs="steps are optimizer updates, not micro-batches; the term is weighed once an update",
        needs=frozenset({"safe_data"}),
        stepper=lambda context: Alternating(rho=rho, align_steps=align_steps, user_steps=user_steps, warm_up=warm_up),
    )
