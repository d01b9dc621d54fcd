"""The loss head, chunk by chunk over tokens: logits, losses and gradients in one pass that never holds all logits.

The gradient is computed in the forward pass, where the logits are; the backward pass only scales it (as in Liger). A
frozen head costs three matrix products: the policy's logits, the reference's, and the gradient of the hidden states.

Shape suffixes: N tokens, H hidden size, V rows of the policy's head, S rows it shares with the reference's, R tokens
of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from safeshape.kernels.project import (
    Head,
    add_product_,
    cast_parts,
    factor_dtype,
    gradient_factor_dtype,
    logits_dtype,
    project_,
)
from safeshape.types import Divergence, Weights

CPU_ROWS = 32  # tokens of a chunk at least: below, matrix products slow down twofold
CHUNK_BYTES = 2**28  # of logits of a chunk at most

RowFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The frozen model's side. Its head is cut to the rows it shares with the policy's, which come first in both."""

    hidden_NH: torch.Tensor
    head: Head


@dataclass(frozen=True, kw_only=True)
class Job:
    """What does not depend on the gradient.

    `order`: indices of the tokens that are used, those compared with the reference (`held` of them) first. `weights`
    have shape (N,) and are already divided by the number of tokens. `ref` is None if no token is compared.
    """

    order: torch.Tensor
    held: int
    labels_N: torch.Tensor
    weights: Weights
    ref: Reference | None
    divergence: Divergence
    scale: float
    softcap: float | None
    chunk_bytes: int | None
    row_function: RowFunction
    gradient: bool


def chunk_rows(tokens: int, columns: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Tokens of a chunk, if there are `tokens` whose logits have `columns` columns in all. At least one.

    On a CPU matrix products are near full speed from 64 rows on; a sixteenth of the tokens keeps both models' chunks
    within an eighth of the full logits of one.
    """
    rows = (CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // max(columns * dtype.itemsize, 1)
    if chunk_bytes is None and device.type == "cpu":
        rows = min(rows, max(CPU_ROWS, tokens // 16))
    return max(1, min(rows, tokens))


def chunks(job: Job, rows: int, ce_rows: int) -> Iterator[tuple[torch.Tensor, Reference | None]]:
    """Token indices of each chunk, and the reference if they are compared with it."""
    for start in range(0, job.held, rows):
        yield job.order[start : min(start + rows, job.held)], job.ref
    for start in range(job.held, len(job.order), ce_rows):
        yield job.order[start : start + ce_rows], None


def same_head(head: Head, ref: Head) -> bool:
    """Whether both models use one head, so that their logits are one product (LoRA: the head is frozen and shared)."""
    ours, theirs = head.weight_VH, ref.weight_VH
    return (
        ours.data_ptr() == theirs.data_ptr()
        and ours.shape == theirs.shape
        and ours.stride() == theirs.stride()
        and ours.dtype == theirs.dtype
        and head.bias_V is None
        and ref.bias_V is None
        and head.scale == ref.scale
    )


class FusedHead(torch.autograd.Function):
    """(hidden_NH, head_VH, bias_V, job) -> loss, sum of cross-entropies, sum of divergences (the last two detached)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, head_VH: torch.Tensor, bias_V: torch.Tensor | None, job: Job
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs = [need and job.gradient for need in ctx.needs_input_grad[:3]]
        head = Head(weight_VH=head_VH, bias_V=bias_V, scale=job.scale, softcap=job.softcap)
        dtype = logits_dtype(hidden_NH, head_VH)
        factor = factor_dtype(hidden_NH, head_VH, dtype)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            sums, grads = run(hidden_NH, head, job, dtype, factor, needs)
        ctx.save_for_backward(*grads)
        loss, ce_sum, kl_sum = (total.clone() for total in sums)  # an output may not be a view
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return loss, ce_sum, kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # On a CPU looking at the factor is free and saves a pass over the head's gradient; elsewhere it would wait.
        if grad.device.type == "cpu" and grad.item() == 1:
            return *ctx.saved_tensors, None
        return *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None


def run(
    hidden_NH: torch.Tensor, head: Head, job: Job, dtype: torch.dtype, factor: torch.dtype, needs: list[bool]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Every chunk: (loss, sum of CE, sum of D), and the gradients of hidden states, head and bias where needed."""
    inputs = (hidden_NH, head.weight_VH, head.bias_V)
    device, vocab, shared = hidden_NH.device, len(head.weight_VH), 0 if job.ref is None else len(job.ref.head.weight_VH)
    rows = chunk_rows(job.held if shared else len(job.order), vocab + shared, dtype, device, job.chunk_bytes)
    buffer = torch.empty(rows * (vocab + shared), dtype=dtype, device=device)
    grads = [  # a token's gradient is written once; those of head and bias add up over chunks
        torch.zeros_like(x, dtype=x.dtype if x is hidden_NH else dtype) if need and x is not None else None
        for need, x in zip(needs, inputs, strict=True)
    ]
    sums = torch.zeros(3, dtype=dtype, device=device)
    for index_R, ref in chunks(job, rows, len(buffer) // vocab):
        hidden_RH, ce_R, kl_R = hidden_NH[index_R], job.weights.ce_BT[index_R], job.weights.kl_BT[index_R]
        z_RV, ref_RS = logits(buffer, hidden_RH, index_R, head, ref, factor)
        value_R, divergence_R = job.row_function(
            z_RV,
            ref_RS,
            job.labels_N[index_R],
            ce_R,
            kl_R,
            divergence=job.divergence,
            softcap=head.softcap,
            ref_softcap=None if ref is None else ref.head.softcap,
            gradient=any(needs),
        )
        sums += torch.stack([ce_R @ value_R + kl_R @ divergence_R, value_R.sum(), divergence_R.sum()])
        if any(needs):
            accumulate_(grads, z_RV, hidden_RH, index_R, head, gradient_factor_dtype(factor))
    typed = [g if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
    return sums, typed


def logits(
    buffer: torch.Tensor,
    hidden_RH: torch.Tensor,
    index_R: torch.Tensor,
    head: Head,
    ref: Reference | None,
    factor: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both models' logits of one chunk in `buffer`; one product where they share the head."""
    count, vocab = len(hidden_RH), len(head.weight_VH)
    z_RV = buffer[: count * vocab].view(count, vocab)
    if ref is None:
        project_(z_RV, hidden_RH, head, factor)
        return z_RV, None
    ref_hidden_RH, shared = ref.hidden_NH[index_R], len(ref.head.weight_VH)
    ref_RS = buffer[count * vocab : count * (vocab + shared)].view(count, shared)
    if same_head(head, ref.head) and ref_hidden_RH.dtype == hidden_RH.dtype:
        both_RV = buffer[: 2 * count * vocab].view(2 * count, vocab)
        project_(both_RV, torch.cat([hidden_RH, ref_hidden_RH]), head, factor)
    else:
        project_(z_RV, hidden_RH, head, factor)
        project_(ref_RS, ref_hidden_RH, ref.head, factor_dtype(ref_hidden_RH, ref.head.weight_VH, buffer.dtype))
    return z_RV, ref_RS


def accumulate_(
    grads: list[torch.Tensor | None],
    grad_RV: torch.Tensor,
    hidden_RH: torch.Tensor,
    index_R: torch.Tensor,
    head: Head,
    factor: torch.dtype,
) -> None:
    """The chain rule through the head, for one chunk."""
    grad_hidden_NH, grad_head_VH, grad_bias_V = grads
    if grad_hidden_NH is not None:
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=grad_RV.dtype)
        for part, weight_CH in cast_parts(head.weight_VH, factor):
            add_product_(grad_hidden_RH, grad_RV[:, part], weight_CH, head.scale)
        grad_hidden_NH[index_R] = grad_hidden_RH.to(grad_hidden_NH.dtype)
    if grad_head_VH is not None:
        add_product_(grad_head_VH, grad_RV.t(), hidden_RH.to(factor), head.scale)
    if grad_bias_V is not None:
        grad_bias_V.add_(grad_RV.sum(0), alpha=head.scale)
