"""The objective from hidden states, without the logits of all tokens: the fused twin of `safeshape.losses`.

Shape suffixes: N tokens, H hidden size, V rows of a head.
"""

from typing import Literal

import torch

from safeshape.kernels.chunked import FusedHead, Job, RowFunction, chunk_rows
from safeshape.kernels.project import Head, operand_dtype, project_, wide
from safeshape.kernels.rows import block_rows, exponentials_, rows_, softcap_
from safeshape.losses import DIVERGENCES, mean_metrics
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
    ref_softcap: float | None | Literal["same"] = "same",
    implementation: Implementation = "auto",
    chunk_bytes: int | None = None,
) -> LossOutput:
    """`safeshape.losses.shaped_loss` of `softcap * tanh((hidden @ head.T + bias) * logit_scale / softcap)`.

    Shapes: `hidden_NH[n]` predicts `labels_N[n]`; both weights have shape (N,). The reference may have another hidden
    size, and other rows at the end of its vocabulary (see `shaped_loss`). Only tokens with a label and a non-zero
    weight are projected, and by the reference only those with a non-zero kl weight; without any, `ref_hidden_NH` and
    `ref_head_VH` may be None. Gradients go to `hidden_NH`, `head_VH` and `bias` where these require one, never to the
    reference. `ref_logit_scale=None` and `ref_softcap="same"` mean the policy's.
    Logits, losses and sums are float32 (float64 where an input is), whatever the inputs: half-precision factors are
    multiplied as they are on a GPU and cast up in parts on a CPU. bfloat16 inputs then give the loss of the same
    numbers in float32 to 1e-5; gradients are rounded once to bfloat16, and on a GPU their factors as well.
    `chunk_bytes` bounds the logits of both models held at a time (one token's at least). None: 64 tokens on a CPU,
    256 MiB elsewhere.
    `implementation`: `torch`, or `triton` for CUDA, which so far has only been run in Triton's interpreter on a CPU,
    never on a GPU; `auto` is therefore `torch`.
    Errors: ValueError for unknown names, shapes that do not match, kl weights without a reference, or a label outside
    the shared rows where the divergence is read at the label.
    Differs: the backward pass cannot itself be differentiated; the gradient was computed in the forward pass.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
    _check_shapes(hidden_NH, head_VH, ref_hidden_NH, ref_head_VH, labels_N, weights)
    row_function = _row_function(implementation)
    counted_N = labels_N != IGNORE
    held_N = counted_N & (weights.kl_BT != 0)
    used_N = held_N | (counted_N & (weights.ce_BT != 0))
    vocab = len(head_VH)
    shared = vocab if ref_head_VH is None else min(vocab, len(ref_head_VH))
    at_label = divergence in ("k2", "k3")
    outside_N = held_N & (labels_N >= shared) if at_label else torch.zeros_like(held_N)
    # The one place where the host waits for the device: how many tokens there are decides the shapes that follow.
    held, used, outside = torch.stack([held_N.sum(), used_N.sum(), outside_N.sum()]).tolist()
    if held and (ref_hidden_NH is None or ref_head_VH is None):
        raise ValueError("kl weights are not zero, but there is no reference")
    if outside:
        raise ValueError(
            f"divergence {divergence!r} needs the reference's probability of every label, but {outside} labels are "
            f"outside the {shared} rows that the two heads share"
        )
    ref = None
    if held and ref_head_VH is not None:
        ref = Head(
            weight_VH=ref_head_VH.detach()[:shared],
            bias_V=None if ref_bias is None else ref_bias.detach()[:shared],
            scale=logit_scale if ref_logit_scale is None else ref_logit_scale,
            softcap=softcap if ref_softcap == "same" else ref_softcap,
        )
    dtype = wide(torch.promote_types(hidden_NH.dtype, head_VH.dtype))
    # An empty optimisation batch is a zero loss with a graph, not 0/0.
    count = torch.as_tensor(num_tokens, device=hidden_NH.device).clamp(min=1)
    job = Job(
        order=torch.argsort(held_N.int() + used_N.int(), descending=True, stable=True)[:used],
        held=held,
        labels_N=labels_N,
        ce_N=weights.ce_BT.detach().to(dtype) / count,
        kl_N=weights.kl_BT.detach().to(dtype) / count,
        ref_hidden_NH=None if ref_hidden_NH is None else ref_hidden_NH.detach(),
        ref=ref,
        divergence=divergence,
        scale=logit_scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        row_function=row_function,
        gradient=torch.is_grad_enabled(),
    )
    loss, ce_sum, kl_sum = FusedHead.apply(hidden_NH, head_VH, bias, job)
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
    operand = operand_dtype(hidden_NH, head_VH)
    dtype = wide(torch.promote_types(hidden_NH.dtype, head_VH.dtype))
    head = Head(weight_VH=head_VH, bias_V=bias, scale=logit_scale, softcap=softcap)
    order = (labels_N != IGNORE).nonzero()[:, 0]
    logp_N = torch.zeros(len(labels_N), dtype=dtype, device=hidden_NH.device)
    rows = chunk_rows(len(head_VH), dtype, hidden_NH.device, chunk_bytes)
    buffer_RV = torch.empty(min(rows, len(order)), len(head_VH), dtype=dtype, device=hidden_NH.device)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, len(order), rows):
            index_R = order[start : start + rows]
            z_RV = buffer_RV[: len(index_R)]
            project_(z_RV, hidden_NH[index_R], head, operand)
            logp_N[index_R] = _label_logp(z_RV, labels_N[index_R], softcap)
    return logp_N


def _label_logp(z_RV: torch.Tensor, labels_R: torch.Tensor, softcap: float | None) -> torch.Tensor:
    step = block_rows(len(z_RV), z_RV.shape[1], z_RV)
    parts = []
    for z, labels_R1 in zip(z_RV.split(step), labels_R[:, None].split(step), strict=True):
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

        return triton_rows_
    raise ValueError(f"unknown implementation {implementation!r}; known: auto, torch, triton")


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
            raise ValueError(
                f"{name}hidden states have shape {tuple(hidden.shape)}, {name}head {tuple(head.shape)}"
            )
    if ref_hidden_NH is not None and len(ref_hidden_NH) != len(hidden_NH):
        raise ValueError(f"there are {len(ref_hidden_NH)} reference hidden states and {len(hidden_NH)} hidden states")
