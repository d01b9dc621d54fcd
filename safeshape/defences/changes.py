"""What fine-tuning changed, weight by weight, in the same form for a LoRA adapter and for full fine-tuning.

Shape suffixes: O outputs and I inputs of a linear layer, K rank of the change (I for full fine-tuning).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from safeshape.defences.records import Context, Model, required


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one linear layer's weight: left @ right, times a factor under LoRA.

    `left_OK`: B of an adapter, or the whole change. `right_KI`: A of an adapter, or None for the identity.
    `set_left`: puts another left side into the model.
    """

    name: str
    left_OK: torch.Tensor
    right_KI: torch.Tensor | None
    set_left: Callable[[torch.Tensor], None]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a language model by name, without its output layer, which often is the embedding."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    }


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The LoRA layers over linear layers, under the names that those have in the base model.

    Errors: ValueError for adapters whose change is not B A times a factor.
    """
    found: dict[str, LoraLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or not isinstance(module.get_base_layer(), nn.Linear):
            raise ValueError(f"this defence works with LoRA on linear layers, and {name} is {type(module).__name__}")
        if any(module.use_dora.values()):
            raise ValueError("this defence works with plain LoRA: with DoRA the change of a weight is not B A")
        found[name] = module
    return found


def changes(model: Model, context: Context, defence: str) -> list[Change]:
    """What fine-tuning changed in the linear layers. Errors: ValueError where the starting weights are needed."""
    if isinstance(model, PeftModel):
        adapter = model.active_adapter
        return [_lora_change(name, layer, adapter) for name, layer in lora_layers(model).items()]
    start = linear_layers(required(context.start, "start", defence))
    return [_full_change(name, layer, start[name]) for name, layer in linear_layers(model).items()]


def _lora_change(name: str, layer: LoraLayer, adapter: str) -> Change:
    b = layer.lora_B[adapter].weight

    def set_left(left_OK: torch.Tensor) -> None:
        with torch.no_grad():
            b.copy_(left_OK)

    return Change(name=name, left_OK=b.detach(), right_KI=layer.lora_A[adapter].weight.detach(), set_left=set_left)


def _full_change(name: str, layer: nn.Linear, start: nn.Linear) -> Change:
    def set_left(left_OK: torch.Tensor) -> None:
        with torch.no_grad():
            layer.weight.copy_(start.weight.to(layer.weight) + left_OK.to(layer.weight))

    # In float32: in half precision the change of a weight is mostly rounding.
    left_OK = layer.weight.detach().float() - start.weight.detach().float().to(layer.weight.device)
    return Change(name=name, left_OK=left_OK, right_KI=None, set_left=set_left)


def alignment_directions(model: Model, context: Context, defence: str) -> dict[str, torch.Tensor]:
    """V = W_aligned - W_base of every linear layer, by name, in float32.

    Errors: ValueError where there is no base model, or one of other shapes.
    """
    base = linear_layers(required(context.base, "base_model", defence))
    aligned = aligned_weights(model, context, defence)
    return {name: _difference(name, weight, base) for name, weight in aligned.items()}


def aligned_weights(model: Model, context: Context, defence: str) -> dict[str, torch.Tensor]:
    """The linear layers' weights before fine-tuning: under an adapter the base's, else the start's."""
    if isinstance(model, PeftModel):
        return {name: layer.get_base_layer().weight.detach() for name, layer in lora_layers(model).items()}
    start = required(context.start, "start", defence)
    return {name: layer.weight.detach() for name, layer in linear_layers(start).items()}


def _difference(name: str, weight: torch.Tensor, base: Mapping[str, nn.Linear]) -> torch.Tensor:
    if name not in base or base[name].weight.shape != weight.shape:
        raise ValueError(f"the base model has no layer {name} of shape {tuple(weight.shape)}; is it the same family?")
    return weight.float() - base[name].weight.detach().float().to(weight.device)


def onto(v_OI: torch.Tensor, left_OK: torch.Tensor) -> torch.Tensor:
    """C @ left with C = V V^T / ||V||_F, without ever making C, which is as large as the layer's output squared.

    C is no projector: its eigenvalues are the squares of V's singular values over their root sum of squares.
    A layer that alignment did not change (V = 0) gives 0.
    """
    left = left_OK.to(v_OI)
    norm = v_OI.norm()
    return v_OI @ (v_OI.T @ left) / norm if float(norm) > 0 else torch.zeros_like(left)


def inner(a_OK: torch.Tensor, b_OK: torch.Tensor, right_KI: torch.Tensor | None) -> torch.Tensor:
    """<a R, b R> of two products with the same right side, from K x K matrices; (a * b).sum() without one."""
    if right_KI is None:
        return (a_OK * b_OK).sum()
    right = right_KI.to(a_OK)
    return ((a_OK.T @ b_OK) * (right @ right.T)).sum()


def cosine(change: Change, v_OI: torch.Tensor) -> float:
    """cos(C change, change); 1 for a layer without a change, which nothing needs to be done about."""
    left = change.left_OK.to(v_OI)
    onto_left = onto(v_OI, left)
    lengths = inner(onto_left, onto_left, change.right_KI) * inner(left, left, change.right_KI)
    if float(inner(left, left, change.right_KI)) == 0:
        return 1.0
    return float(inner(onto_left, left, change.right_KI) / lengths.sqrt()) if float(lengths) > 0 else 0.0
