"""Methods that look at a change through the directions of alignment: SafeLoRA, SafeMERGE, AsFT.

Shape suffixes: O outputs and I inputs of a linear layer, K rank of the change.
"""

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from safeshape.defences.changes import (
    aligned_weights,
    alignment_directions,
    changes,
    cosine,
    inner,
    linear_layers,
    lora_layers,
    onto,
)
from safeshape.defences.nested import merged, trained_on
from safeshape.defences.records import Context, Defence, Model, required, within
from safeshape.defences.stepping import Loop, Stepper


def to_project(cosines: Mapping[str, float], threshold: float, layers: int | None) -> set[str]:
    """Which weights are off: cosine at most the threshold, or the `layers` of the lowest cosine."""
    if layers is not None:
        threshold = sorted(cosines.values())[min(layers, len(cosines)) - 1]
    return {name for name, value in cosines.items() if value <= threshold}


def safe_lora(*, threshold: float = 0.35, layers: int | None = None) -> Defence:
    """SafeLoRA (NeurIPS 2024, arXiv 2405.16833): B <- C B where cos(C B A, B A) <= threshold.

    C = V V^T / ||V||_F with V = W_aligned - W_base. `threshold`: the paper's. `layers`: instead the so many weights of
    lowest cosine, the released code's way (its default is 10). For full fine-tuning the change W - W_aligned stands
    for B A.
    """
    within("threshold", threshold, -1, 1)
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
        raise ValueError(f"layers must be a whole number of at least 1, got {layers!r}")

    def finish(model: Model, context: Context) -> Model:
        directions = alignment_directions(model, context, "safe_lora")
        found = changes(model, context, "safe_lora")
        off = to_project({c.name: cosine(c, directions[c.name]) for c in found}, threshold, layers)
        for change in found:
            if change.name in off:
                change.set_left(onto(directions[change.name], change.left_OK))
        return model

    return Defence(
        name="safe_lora",
        stage="after",
        source="SafeLoRA, arXiv 2405.16833",
        differs="for full fine-tuning all linear layers but the output layer are looked at",
        needs=frozenset({"base_model"}),
        keeps_start="full",
        finish=finish,
    )


def safe_merge(*, threshold: float = 0.35, task: float = 0.8) -> Defence:
    """SafeMERGE (ACL Findings 2026, arXiv 2503.17239): off-subspace weights become task * change + (1 - task) * safe.

    `safe` is the change of the same start fine-tuned on the safe data under the same settings; a weight is off where
    SafeLoRA's cosine is below the threshold.
    """
    within("threshold", threshold, -1, 1)
    within("task", task, 0, 1)

    def finish(model: Model, context: Context) -> Model:
        start = required(context.start, "start", "safe_merge")
        directions = alignment_directions(model, context, "safe_merge")
        off = [c.name for c in changes(model, context, "safe_merge") if cosine(c, directions[c.name]) < threshold]
        safe = merged(trained_on(start, required(context.safe_data, "safe_data", "safe_merge"), context, "safe_merge"))
        result = merged(model)
        before, safe_layers, layers = linear_layers(start), linear_layers(safe), linear_layers(result)
        with torch.no_grad():
            for name in off:
                weight = layers[name].weight
                w0, other = (m[name].weight.float().to(weight.device) for m in (before, safe_layers))
                mixed = task * (weight.float() - w0) + (1 - task) * (other - w0)
                weight.copy_(w0 + mixed)
        return result

    return Defence(
        name="safe_merge",
        stage="after",
        source="SafeMERGE, arXiv 2503.17239",
        differs=(
            "changes are mixed, not the factors B and A apart as the released code does; an adapter therefore comes "
            "out merged into its base"
        ),
        needs=frozenset({"base_model", "safe_data"}),
        keeps_start="always",
        finish=finish,
    )


class NarrowBasin(Stepper):
    """Adds strength * sum of ||(I - C) change||_F^2 to the loss, once an update.

    With M = (I - C) B it is ||M A||^2 = trace(M^T M A A^T): K x K products only, never an O x O matrix.
    """

    def __init__(self, context: Context, *, strength: float) -> None:
        self.context, self.strength = context, strength
        self._directions: dict[str, torch.Tensor] = {}
        self._start: dict[str, torch.Tensor] = {}
        self._layers: dict[str, nn.Module] = {}

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Find the layers that are trained, and what alignment changed in them."""
        if not isinstance(model, PeftModel | PreTrainedModel):
            raise ValueError("asft needs a language model or a LoRA adapter on one")
        if isinstance(model, PeftModel):
            self._layers = dict(lora_layers(model))
            self._adapter = model.active_adapter
        else:
            self._layers = dict(linear_layers(model))
            # Of the copy that is kept anyway, but beside the weights that are trained.
            weights = aligned_weights(model, self.context, "asft")
            self._start = {name: weight.to(model.device) for name, weight in weights.items()}
        found = alignment_directions(model, self.context, "asft")
        self._directions = {name: v_OI.to(model.device) for name, v_OI in found.items()}

    def _sides(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = self._layers[name]
        if isinstance(layer, LoraLayer):
            return layer.lora_B[self._adapter].weight, layer.lora_A[self._adapter].weight
        if isinstance(layer, nn.Linear):
            return layer.weight - self._start[name], None
        raise ValueError(f"asft cannot read the change of {name}")

    def penalty(self) -> torch.Tensor:
        """The sum over all layers, with its graph."""
        total = torch.zeros(())
        for name, v_OI in self._directions.items():
            left_OK, right_KI = self._sides(name)
            outside_OK = left_OK.to(v_OI) - onto(v_OI, left_OK)
            total = total.to(v_OI.device) + inner(outside_OK, outside_OK, right_KI)
        return self.strength * total

    def gradients(self, loop: Loop) -> torch.Tensor:
        """The user's gradient plus that of the penalty."""
        loss = loop.user()
        penalty = self.penalty()
        penalty.backward()  # type: ignore[no-untyped-call]
        return loss + penalty.detach()


def asft(*, strength: float = 1.0) -> Defence:
    """AsFT (NeurIPS 2025, arXiv 2506.08473): L + lambda * sum ||(I - C) B A||_F^2.

    C = V V^T / ||V||_F, V = W_aligned - W_base; `strength` is lambda. B A is taken without the adapter's factor, as
    in the released code.
    """
    within("strength", strength, 0, float("inf"))
    return Defence(
        name="asft",
        stage="fine-tuning",
        source="AsFT, arXiv 2506.08473",
        differs=(
            "added once an update (the released code adds it once a micro-batch); for full fine-tuning, which the "
            "paper does not do, W - W_aligned stands for B A"
        ),
        needs=frozenset({"base_model"}),
        keeps_start="full",
        stepper=lambda context: NarrowBasin(context, strength=strength),
    )
