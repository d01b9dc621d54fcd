"""The objective from hidden states, without the logits of all tokens: the fused twin of `safeshape.losses`.

Shape suffixes: N tokens, H hidden size, V rows of a head.
"""

from dataclasses import replace
from typing import Literal

import torch

from safeshape.kernels.chunked import FusedHead, Job, Reference, RowFunction, chunk_rows
from safeshape.kernels.project import Head, factor_dtype, logits_dtype, project_
from safeshape.kernels.rows import block_rows, exponentials_, rows_, softcap_
from safeshape.losses import AT_LABEL, DIVERGENCES, NOT_SHARED, mean_metrics
from safeshape.types import IGNORE, Divergence, LossOutput, Weights

Implementation = Literal["auto", "torch", "triton"]


def fused_shaped_loss(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    ref_hidden_NH: torch.Tensor | None,
    ref_head_VH: torch.Tensor | None,
    labels_N: torch.Tensor,
    weights: Weights,
    *,
    divergence: Divergence = "reverse",
    num_tokens: int | torch.Tensor,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | Literal["same"] | None = "same",
    implementation: Implementation = "auto",
    chunk_bytes: int | None = None,
) -> LossOutput:
    """`safeshape.losses.shaped_loss` of `softcap * tanh((hidden @ head.T + bias) * logit_scale / softcap)`.

    Shapes: `hidden_NH[n]` predicts `labels_N[n]`; both weights have shape (N,). The reference may have another hidden
    size and other rows at the end of its vocabulary (see `shaped_loss`). Only tokens with a label and a non-zero weight
    are projected, and by the reference only those with a kl weight; without any, it may be None. Gradients go to
    `hidden_NH`, `head_VH` and `bias` where these require one, never to the reference. `ref_logit_scale=None` and
    `ref_softcap="same"` mean the policy's.
    Logits, losses and sums are float32 (float64 where an input is): CUDA multiplies half-precision factors as they
    are, other devices cast them up in parts. bfloat16 inputs give the loss of the same numbers in float32 to 1e-5, and
    its gradient rounded to bfloat16; CUDA also rounds the gradient of the logits to bfloat16 before it is multiplied.
    `chunk_bytes` bounds the logits of both models held at a time (one token's at least). None: 256 MiB, and on a CPU
    no more than a sixteenth of the tokens, but at least 32.
    `implementation`: `torch`, or `triton` for CUDA, which has run in Triton's interpreter and been compiled for sm_90,
    but never run on a GPU; `auto` is therefore `torch`.
    Errors: ValueError for unknown names, shapes that do not match, kl weights without a reference, or a label outside
    the shared rows where the divergence is read at the label.
    Differs: the backward pass cannot itself be differentiated; the gradient was computed in the forward pass.
    """
    _check_shapes(hidden_NH, head_VH, ref_hidden_NH, ref_head_VH, labels_N, weights)
    ref = None
    if ref_hidden_NH is not None and ref_head_VH is not None:
        scale = logit_scale if ref_logit_scale is None else ref_logit_scale
        cap = softcap if ref_softcap == "same" else ref_softcap
        ref = _reference(ref_hidden_NH, Head(weight_VH=ref_head_VH, bias_V=ref_bias, scale=scale, softcap=cap), head_VH)
    used_N, held_N, order, held = _select(labels_N, weights, divergence, ref)
    job = Job(
        order=order,
        held=held,
        labels_N=labels_N,
        weights=_divided(weights, num_tokens, logits_dtype(hidden_NH, head_VH)),
        ref=ref if held else None,
        divergence=divergence,
        scale=logit_scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        row_function=_row_function(implementation),
        gradient=torch.is_grad_enabled(),
    )
    loss, ce_sum, kl_sum = FusedHead.apply(hidden_NH, head_VH, bias, job)  # type: ignore[no-untyped-call]
    return LossOutput(loss=loss, metrics=mean_metrics(ce_sum, kl_sum, used_N, held_N))


@torch.no_grad()
def fused_label_logp(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Log-probability of each label, chunk by chunk, without a gradient; 0 where the label is -100.

    Shapes: as in `fused_shaped_loss`; returns (N,) in float32 (float64 where an input is). Units: nats.
    """
    dtype = logits_dtype(hidden_NH, head_VH)
    factor = factor_dtype(hidden_NH, head_VH, dtype)
    head = Head(weight_VH=head_VH, bias_V=bias, scale=logit_scale, softcap=softcap)
    order = (labels_N != IGNORE).nonzero()[:, 0]
    logp_N = torch.zeros(len(labels_N), dtype=dtype, device=hidden_NH.device)
    rows = chunk_rows(len(order), len(head_VH), dtype, hidden_NH.device, chunk_bytes)
    buffer_RV = torch.empty(rows, len(head_VH), dtype=dtype, device=hidden_NH.device)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, len(order), rows):
            index_R = order[start : start + rows]
            z_RV = buffer_RV[: len(index_R)]
            project_(z_RV, hidden_NH[index_R], head, factor)
            logp_N[index_R] = _label_logp(z_RV, labels_N[index_R], softcap)
    return logp_N


def _label_logp(z_RV: torch.Tensor, labels_R: torch.Tensor, softcap: float | None) -> torch.Tensor:
    step = block_rows(len(z_RV), z_RV.shape[1], z_RV)
    parts = []
    for start in range(0, len(z_RV), step):
        z, labels_R1 = z_RV[start : start + step], labels_R[start : start + step, None]
        softcap_(z, softcap)
        label_logit_R1 = z.gather(-1, labels_R1)
        top_R1, total_R1 = exponentials_(z)
        parts.append((label_logit_R1 - top_R1) - torch.log(total_R1))
    return torch.cat(parts)[:, 0]


def _row_function(implementation: Implementation) -> RowFunction:
    if implementation in ("auto", "torch"):
        return rows_
    if implementation == "triton":
        from safeshape.kernels.triton import rows_ as triton_rows_

        rows: RowFunction = triton_rows_
        return rows
    raise ValueError(f"unknown implementation {implementation!r}; known: auto, torch, triton")


def _reference(hidden_NH: torch.Tensor, head: Head, policy_head_VH: torch.Tensor) -> Reference:
    shared = min(len(policy_head_VH), len(head.weight_VH))
    bias_S = None if head.bias_V is None else head.bias_V.detach()[:shared]
    return Reference(
        hidden_NH=hidden_NH.detach(),
        head=replace(head, weight_VH=head.weight_VH.detach()[:shared], bias_V=bias_S),
    )


def _divided(weights: Weights, num_tokens: int | torch.Tensor, dtype: torch.dtype) -> Weights:
    # An empty optimisation batch is a zero loss with a graph, not 0/0.
    count = torch.as_tensor(num_tokens, device=weights.ce_BT.device).clamp(min=1)
    return Weights(ce_BT=weights.ce_BT.detach().to(dtype) / count, kl_BT=weights.kl_BT.detach().to(dtype) / count)


def _select(
    labels_N: torch.Tensor, weights: Weights, divergence: Divergence, ref: Reference | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Which tokens are used and which are compared; the indices of those used, the compared ones first; their number.

    The host waits for the device here and nowhere else: how many tokens there are decides all later shapes.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
    counted_N = labels_N != IGNORE
    held_N = counted_N & (weights.kl_BT != 0)
    used_N = held_N | (counted_N & (weights.ce_BT != 0))
    outside_N = torch.zeros_like(held_N)
    if ref is not None and divergence in AT_LABEL:
        outside_N = held_N & (labels_N >= len(ref.head.weight_VH))
    held, used, outside = torch.stack([held_N.sum(), used_N.sum(), outside_N.sum()]).tolist()
    if held and ref is None:
        raise ValueError("kl weights are not zero, but there is no reference")
    if outside:
        raise ValueError(f"divergence {divergence!r} is read at the label, and {outside} labels {NOT_SHARED}")
    order = torch.argsort(held_N.int() + used_N.int(), descending=True, stable=True)[:used]
    return used_N, held_N, order, held


def _check_shapes(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    ref_hidden_NH: torch.Tensor | None,
    ref_head_VH: torch.Tensor | None,
    labels_N: torch.Tensor,
    weights: Weights,
) -> None:
    for name, tensor in (("labels", labels_N), ("ce weights", weights.ce_BT), ("kl weights", weights.kl_BT)):
        if tensor.shape != hidden_NH.shape[:1]:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, hidden states {tuple(hidden_NH.shape)}")
    for name, hidden, head in (("", hidden_NH, head_VH), ("reference ", ref_hidden_NH, ref_head_VH)):
        if hidden is not None and head is not None and hidden.shape[1:] != head.shape[1:]:
            raise ValueError(f"{name}hidden states have shape {tuple(hidden.shape)}, {name}head {tuple(head.shape)}")
    if ref_hidden_NH is not None and len(ref_hidden_NH) != len(hidden_NH):
        raise ValueError(f"there are {len(ref_hidden_NH)} reference hidden states and {len(hidden_NH)} hidden states")
