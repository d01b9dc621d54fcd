"""How a defence makes the gradients of one optimisation step.

A stepper sees the whole optimisation batch at once, all its micro-batches, so that splitting a batch into smaller ones
changes nothing but rounding.
Shape suffixes: B rows, T predicted tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from safeshape.types import IGNORE

Inputs = dict[str, Any]
Gradients = dict[str, torch.Tensor]
# The share of one micro-batch in the loss of the whole batch: (model, inputs, response tokens of the whole batch).
LossOf = Callable[[nn.Module, Inputs, torch.Tensor], torch.Tensor]
ROW = "row_number"
_NOT_FORWARD = {"labels", "p_safe", "answer_p_safe", "cache_index", "row_index", ROW}


def forward_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model itself is called with."""
    return {name: value for name, value in inputs.items() if name not in _NOT_FORWARD}


def token_losses(model: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every predicted token (B, T), zero where no label counts, and which ones count."""
    logits_BTV = model(**forward_of(inputs), use_cache=False).logits[:, :-1].float()
    labels_BT = inputs["labels"][:, 1:]
    ce_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORE)
    return ce_BT, labels_BT != IGNORE


def token_mean(model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
    """Plain fine-tuning: the mean cross-entropy over the response tokens of the whole batch."""
    ce_BT, _ = token_losses(model, inputs)
    return ce_BT.sum() / num_tokens


def example_means(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The mean cross-entropy of each row's response tokens, (B,)."""
    ce_BT, counted_BT = token_losses(model, inputs)
    return ce_BT.sum(-1) / counted_BT.sum(-1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The micro-batches of one optimisation batch, ready to be run forward and backward.

    `own`: what runs when no loss is named: the trainer's own loss of its policy. `count`: told of every run.
    """

    model: nn.Module
    batches: Sequence[Inputs]
    autocast: Callable[[], AbstractContextManager[Any]]
    own: Callable[[], torch.Tensor] | None = None
    count: Callable[[], None] = lambda: None

    @property
    def num_tokens(self) -> torch.Tensor:
        """Response tokens of the whole batch, at least 1."""
        counted = [(inputs["labels"][:, 1:] != IGNORE).sum() for inputs in self.batches]
        return torch.stack(counted).sum().clamp(min=1)

    @property
    def examples(self) -> int:
        """Rows of the whole batch."""
        return sum(len(inputs["labels"]) for inputs in self.batches)

    def __call__(self, loss_of: LossOf | None = None) -> torch.Tensor:
        """Add the loss's gradient to `.grad`; the loss itself comes back without a graph."""
        self.count()
        if loss_of is None and self.own is not None:
            return self.own()
        loss_of, num_tokens = loss_of or token_mean, self.num_tokens
        total = torch.zeros((), device=num_tokens.device)
        for inputs in self.batches:
            with self.autocast():
                loss = loss_of(self.model, inputs, num_tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def look(self, read: Callable[[nn.Module, Inputs], torch.Tensor]) -> list[torch.Tensor]:
        """What `read` makes of each micro-batch, without gradients."""
        with torch.no_grad(), self.autocast():
            return [read(self.model, inputs) for inputs in self.batches]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One optimisation step as a stepper sees it.

    `parameters`: what is trained, by name. `step`: updates made before this one. `user`: the batch that the trainer
    drew; `safe`, `harmful`: batches of `drawn_rows` rows each, of the alignment and the harmful data, the same in a
    resumed run.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    step: int
    total_steps: int
    user: Callable[..., torch.Tensor]
    safe: Callable[..., torch.Tensor]
    harmful: Callable[..., torch.Tensor]
    epoch: float = 0.0
    drawn_rows: int = 1


class Stepper:
    """What makes the gradients of each step. The default is plain fine-tuning."""

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Called once, with the weights before the first step, also in a run that will resume later ones."""

    def gradients(self, loop: Loop) -> torch.Tensor:
        """Leave the step's gradient in `.grad` (it is empty before) and return the loss to be logged."""
        return loop.user()

    def after(self, loop: Loop) -> None:
        """Called after the optimizer's update."""

    def finish(self, model: nn.Module) -> None:
        """Called once, when training has ended."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold so that a resumed run goes on as if nothing had happened."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""


def gradients_of(loop: Loop, run: Callable[[], torch.Tensor]) -> tuple[Gradients, torch.Tensor]:
    """The gradient that `run` makes, by name (zeros where it makes none), and its loss; `.grad` is as before."""
    before = {name: parameter.grad for name, parameter in loop.parameters.items()}
    for parameter in loop.parameters.values():
        parameter.grad = None
    loss = run()
    found: Gradients = {}
    for name, parameter in loop.parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = before[name]
    return found, loss


def set_gradients(loop: Loop, gradients: Gradients) -> None:
    """Put these gradients in place of what is there."""
    for name, parameter in loop.parameters.items():
        parameter.grad = gradients[name].to(parameter)


def add_gradients(loop: Loop, gradients: Mapping[str, torch.Tensor]) -> None:
    """Add these to the gradients that are there."""
    for name, gradient in gradients.items():
        parameter = loop.parameters[name]
        parameter.grad = gradient.to(parameter) if parameter.grad is None else parameter.grad + gradient.to(parameter)


def dot(a: Gradients, b: Gradients) -> torch.Tensor:
    """The inner product over all parameters, in float32."""
    return torch.stack([(a[name].float() * b[name].float()).sum() for name in a]).sum()


@contextmanager
def moved(loop: Loop, by: Gradients) -> Iterator[None]:
    """Parameters moved for a while, and put back bit for bit."""
    saved = {name: parameter.detach().clone() for name, parameter in loop.parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in loop.parameters.items():
                parameter.add_(by[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in loop.parameters.items():
                parameter.copy_(saved[name])


def indices_of_step(rows: int, batch: int, step: int, seed: int) -> list[int]:
    """Which rows the batch of this step holds: one shuffled order after the other, each of its own seed.

    It depends on nothing but its arguments, so a resumed run draws what the whole run drew.
    """
    found: list[int] = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, within = divmod(place, rows)
        if not found or within == 0:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        found.append(int(order[within]))
    return found


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A prepared dataset from which each step takes a batch of its own."""

    rows: Dataset
    collate: Callable[[list[dict[str, Any]]], Inputs]
    batch: int
    micro_batch: int
    seed: int

    def at(self, step: int) -> list[Inputs]:
        """The micro-batches of this step."""
        picked = indices_of_step(len(self.rows), self.batch, step, self.seed)
        return [
            self.collate([self.rows[i] for i in picked[k : k + self.micro_batch]])
            for k in range(0, len(picked), self.micro_batch)
        ]
