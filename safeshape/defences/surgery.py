"""SafeGrad: what a user's gradient holds against the alignment gradient is taken out of it.

Shape suffixes: B rows, T predicted tokens, V vocabulary, N response tokens.
"""

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from safeshape.defences.records import Defence, within
from safeshape.defences.stepping import (
    Gradients,
    Inputs,
    Loop,
    Stepper,
    dot,
    forward_of,
    gradients_of,
    set_gradients,
)
from safeshape.losses import forward_kl, log_softmax
from safeshape.models.loading import evaluation_mode
from safeshape.models.reference import frozen_copy
from safeshape.types import IGNORE


def without_conflict(user: Gradients, aligned: Gradients) -> Gradients:
    """g_u - (<g_u, g_a> / ||g_a||^2) g_a where the inner product over all parameters is negative, else g_u."""
    product = dot(user, aligned)
    if float(product) >= 0:
        return user
    share = product / dot(aligned, aligned)
    return {name: gradient - share.to(gradient) * aligned[name] for name, gradient in user.items()}


class Surgery(Stepper):
    """Steps on g_u (cleared of conflict) + rho * g_a, g_a the gradient of KL(pi_0 || pi) on alignment data."""

    def __init__(self, *, rho: float, temperature: float) -> None:
        self.rho, self.temperature = rho, temperature
        self._reference: nn.Module | None = None

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the starting model: a copy, or under an adapter the base with the adapter off."""
        self._reference = None if isinstance(model, PeftModel) else frozen_copy(model)

    def divergence(self, model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
        """KL(pi_0 || pi_theta) over the response tokens, in nats, at the temperature, divided by their number."""
        counted_BT = inputs["labels"][:, 1:] != IGNORE
        with torch.no_grad():
            reference_NV = self._reference_logits(model, inputs)[:, :-1][counted_BT] / self.temperature
        logits_NV = model(**forward_of(inputs), use_cache=False).logits[:, :-1][counted_BT] / self.temperature
        kl_N = forward_kl(log_softmax(logits_NV), log_softmax(reference_NV), inputs["labels"][:, 1:][counted_BT])
        return kl_N.sum() / num_tokens

    def _reference_logits(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        logits: torch.Tensor
        if self._reference is not None:
            logits = self._reference(**forward_of(inputs), use_cache=False).logits
        elif isinstance(model, PeftModel):
            with evaluation_mode(model), model.disable_adapter():
                logits = model(**forward_of(inputs), use_cache=False).logits
        else:
            raise ValueError("the adapter is wrapped, so the model without it cannot be run")
        return logits

    def gradients(self, loop: Loop) -> torch.Tensor:
        """Both gradients are of the whole batch, so splitting it changes nothing."""
        user, loss = gradients_of(loop, loop.user)
        aligned, divergence = gradients_of(loop, lambda: loop.safe(self.divergence))
        clear = without_conflict(user, aligned)
        set_gradients(loop, {name: value + self.rho * aligned[name] for name, value in clear.items()})
        return loss + self.rho * divergence


def safe_grad(*, rho: float = 1.0, temperature: float = 1.0) -> Defence:
    """SafeGrad (ICASSP 2026, arXiv 2508.07172): one inner product over all parameters, defaults rho 1, T 1."""
    within("rho", rho, 0, float("inf"))
    within("temperature", temperature, 1e-6, float("inf"))
    return Defence(
        name="safe_grad",
        stage="fine-tuning",
        source="SafeGrad, arXiv 2508.07172",
        differs="KL over response tokens only (reference code sums it over padding too); exact under accumulation",
        needs=frozenset({"safe_data"}),
        stepper=lambda context: Surgery(rho=rho, temperature=temperature),
    )
