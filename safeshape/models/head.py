"""The last step of a language model: from final hidden states to logits, without building them for every token.

Shape suffixes: B rows, L tokens of the padded batch, N response tokens, H hidden size, V vocabulary.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

# Names that architectures give the factor on their logits; Granite and MiniCPM divide by theirs.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISOR = "logits_scaling"

# What runs inside the model's forward: (the causal language model, its decoder's output) -> tensors by name. The
# output holds `last_hidden_state` (B, L, H) and, where it was asked for, `hidden_states` of every layer.
Shaped = Callable[[PreTrainedModel, BaseModelOutputWithPast], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight_VH.T + bias_V) / softcap); without a cap no tanh."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None


def read_head(model: PreTrainedModel) -> Head:
    """The head of a causal language model, as its weights are now. To be called inside the model's forward.

    A sharded weight (FSDP2) is gathered for the moment. Errors: ValueError when the output layer is not linear.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output layer")
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if isinstance(bias, DTensor):
        bias = bias.full_tensor()
    scale, softcap = head_settings(model)
    return Head(weight_VH=weight, bias_V=bias, scale=scale, softcap=softcap)


def head_settings(model: PreTrainedModel) -> tuple[float, float | None]:
    """The factor on the logits and their soft cap, from the model's configuration."""
    settings = model.config.get_text_config().to_dict()
    scale = next((settings[name] for name in _MULTIPLIERS if settings.get(name) is not None), None)
    if scale is None:
        scale = 1.0 if settings.get(_DIVISOR) is None else 1.0 / settings[_DIVISOR]
    return float(scale), settings.get("final_logit_softcapping")


def project(head: Head, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Full logits (N, V) in at least float32; the readable twin of what the fused loss does in pieces."""
    weight_VH = head.weight_VH.to(torch.promote_types(head.weight_VH.dtype, torch.float32))
    bias_V = None if head.bias_V is None else head.bias_V.to(weight_VH)
    logits_NV = F.linear(hidden_NH.to(weight_VH), weight_VH, bias_V) * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(shaped: Shaped, model: PreTrainedModel, states: BaseModelOutputWithPast) -> dict[str, torch.Tensor]:
    # How many tokens are projected differs from batch to batch, so a compiled graph would be made anew for each.
    return shaped(model, states)


def add_shaped_forward(model: PreTrainedModel) -> None:
    """Let `model(..., shaped=function)` return `function(model, the decoder's output)` instead of logits.

    The function runs inside the model's forward, where weights that are sharded over processes are at hand; so data
    parallel wrappers, adapters, autocast and compilation around the model keep working. Without `shaped`, nothing
    changes.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, shaped: Shaped | None = None, **kwargs: Any) -> Any:
        if shaped is None:
            return original(*args, **kwargs)
        return _uncompiled(shaped, self, self.base_model(*args, **kwargs, use_cache=False))

    model.forward = types.MethodType(forward, model)
