"""Alignment against a harmful step to come: Booster and RepNoise.

Shape suffixes: B rows, L tokens of the padded batch, T = L - 1 predicted tokens, H hidden size, F a row flattened.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from safeshape.defences.embedding import at_outputs
from safeshape.defences.records import Context, Defence, within
from safeshape.defences.stepping import Inputs, Loop, Stepper, dot, forward_of, gradients_of, moved, set_gradients
from safeshape.models.reference import causal_model
from safeshape.types import IGNORE


class Boosted(Stepper):
    """g = grad f + lambda * (grad h(w) - grad h(w - alpha * grad h / ||grad h||)); f: alignment, h: harmful data."""

    def __init__(self, *, strength: float, alpha: float) -> None:
        self.strength, self.alpha = strength, alpha

    def gradients(self, loop: Loop) -> torch.Tensor:
        """Three passes. The loss is that of f alone."""
        harmful, _ = gradients_of(loop, loop.harmful)
        scale = -self.alpha / (dot(harmful, harmful).sqrt() + 1e-7)
        with moved(loop, {name: scale.to(value) * value for name, value in harmful.items()}):
            after, _ = gradients_of(loop, loop.harmful)
        aligned, loss = gradients_of(loop, loop.user)
        set_gradients(loop, {name: aligned[name] + self.strength * (harmful[name] - after[name]) for name in aligned})
        return loss


def booster(*, strength: float = 5.0, alpha: float = 0.1, learning_rate: float = 5e-4, epochs: float = 20) -> Defence:
    """Booster (ICLR 2025, arXiv 2409.01586, algorithm 1): alignment that makes a harmful step reduce little harm loss.

    `strength` is lambda, `alpha` the size of the harmful step, `learning_rate` and `epochs` those of the alignment run.
    """
    within("strength", strength, 0, float("inf"))
    within("alpha", alpha, 0, float("inf"))
    within("learning_rate", learning_rate, 0, float("inf"))
    within("epochs", epochs, 0, float("inf"))
    return Defence(
        name="booster",
        stage="alignment",
        source="Booster, arXiv 2409.01586, algorithm 1",
        differs="hardens a model that is aligned already",
        needs=frozenset({"safe_data", "harmful_data"}),
        stepper=lambda context: Boosted(strength=strength, alpha=alpha),
        alignment={"learning_rate": learning_rate, "num_train_epochs": float(epochs)},
    )


def mmd(source_BF: torch.Tensor, target_BF: torch.Tensor, *, kernels: int = 5, factor: float = 2.0) -> torch.Tensor:
    """Squared maximum mean discrepancy with a sum of Gaussian kernels around the mean squared distance.

    mean(k(x, x') + k(y, y') - k(x, y') - k(y, x')), bandwidths b / 4, b / 2, b, 2 b, 4 b; as in the released code the
    diagonal is included.
    """
    both = torch.cat([source_BF, target_BF])
    count, half = len(both), len(source_BF)
    distances = (both[None] - both[:, None]).square().sum(-1)
    width = distances.detach().sum() / (count**2 - count) / factor ** (kernels // 2)
    values = torch.stack([torch.exp(-distances / (width * factor**i).clamp(min=1e-30)) for i in range(kernels)]).sum(0)
    return (values[:half, :half] + values[half:, half:] - values[:half, half:] - values[half:, :half]).mean()


class Noised(Stepper):
    """CE_safe + beta * mean over layers of MMD(MLP outputs on harmful data, noise) - alpha * log(1 + harmful CE).

    The harmful CE is the mean over the logits of every layer's states, the last norm and the head applied to each.
    """

    def __init__(self, *, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self._mlps: dict[str, nn.Module] = {}

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Find the MLPs. Errors: ValueError for a model without any."""
        self._mlps = {name: module for name, module in model.named_modules() if name.endswith(".mlp")}
        if not self._mlps:
            raise ValueError(f"{type(model).__name__} has no modules named mlp, which repnoise reads")

    def harm(self, model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
        """beta * noise loss - alpha * log(1 + harmful CE) of one batch."""
        outputs: list[torch.Tensor] = []
        with at_outputs(self._mlps, lambda name, output: outputs.append(output)):
            found = model(**forward_of(inputs), use_cache=False, output_hidden_states=True)
        answer_BL = inputs["labels"] != IGNORE
        noise = torch.stack([self._noise(states_BLH, answer_BL) for states_BLH in outputs]).mean()
        causal = causal_model(model)
        losses = [_cross_entropy(found.logits, inputs["labels"])]
        losses += [_lens(causal, states_BLH, inputs["labels"]) for states_BLH in found.hidden_states]
        mean = torch.stack(losses).sum() / len(found.hidden_states)
        return self.beta * noise - self.alpha * torch.log(1 + mean)

    @staticmethod
    def _noise(states_BLH: torch.Tensor, answer_BL: torch.Tensor) -> torch.Tensor:
        masked_BLH = states_BLH.float() * answer_BL[..., None]
        noise_BLH = torch.randn_like(masked_BLH) * answer_BL[..., None]
        return mmd(masked_BLH.flatten(1), noise_BLH.flatten(1))

    def gradients(self, loop: Loop) -> torch.Tensor:
        """The gradient of all three terms."""
        return loop.user() + loop.harmful(self.harm)


def _cross_entropy(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BLV[:, :-1].float().flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORE)


def _lens(causal: PreTrainedModel, states_BLH: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    head, norm = causal.get_output_embeddings(), dict(causal.base_model.named_children()).get("norm")
    if head is None or norm is None:
        raise ValueError(f"repnoise reads states through a last `norm` and a head; {type(causal).__name__} lacks one")
    return _cross_entropy(head(norm(states_BLH)), labels_BL)


def _repnoise_stepper(context: Context, alpha: float, beta: float) -> Noised:
    if context.args.gradient_accumulation_steps > 1:
        raise ValueError(
            "repnoise compares the rows of a batch with one another, so they must be in one micro-batch; set "
            "gradient_accumulation_steps to 1"
        )
    return Noised(alpha=alpha, beta=beta)


def repnoise(*, alpha: float = 1.0, beta: float = 1e-3, learning_rate: float = 5e-4, epochs: float = 20) -> Defence:
    """RepNoise (NeurIPS 2024, arXiv 2405.14577): harmful states pushed to noise, harmful loss pushed up.

    `alpha` weighs the harmful loss, `beta` the noise; its authors search both for every model.
    """
    within("alpha", alpha, 0, float("inf"))
    within("beta", beta, 0, float("inf"))
    within("learning_rate", learning_rate, 0, float("inf"))
    within("epochs", epochs, 0, float("inf"))
    return Defence(
        name="repnoise",
        stage="alignment",
        source="RepNoise, arXiv 2405.14577",
        differs=(
            "the tokens of the answers stand for those in which paired answers differ, so that data need no pairs; "
            "learning rate and epochs are Booster's"
        ),
        needs=frozenset({"safe_data", "harmful_data"}),
        stepper=lambda context: _repnoise_stepper(context, alpha, beta),
        alignment={"learning_rate": learning_rate, "num_train_epochs": float(epochs)},
    )
