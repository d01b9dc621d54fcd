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

from safeshape.kernels.project import Head, add_product_, cast_parts, gradient_operand, operand_dtype, project_, wide
from safeshape.types import Divergence

CPU_ROWS = 64  # tokens of a chunk: enough for matrix products near full speed, whatever the vocabulary
ACCELERATOR_BYTES = 2**28  # of logits of a chunk

RowFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What does not depend on the gradient.

    `order`: indices of the tokens that are used, those compared with the reference (`held` of them) first. `ce_N`,
    `kl_N`: weights, already divided by the number of tokens. `ref` is None if no token is compared.
    """

    order: torch.Tensor
    held: int
    labels_N: torch.Tensor
    ce_N: torch.Tensor
    kl_N: torch.Tensor
    ref_hidden_NH: torch.Tensor | None
    ref: Head | None
    divergence: Divergence
    scale: float
    softcap: float | None
    chunk_bytes: int | None
    row_function: RowFunction
    gradient: bool


def chunk_rows(columns: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Tokens of a chunk whose logits have `columns` columns in all. At least one, whatever the budget."""
    row_bytes = columns * dtype.itemsize
    if chunk_bytes is None and device.type == "cpu":
        return CPU_ROWS
    return max(1, (ACCELERATOR_BYTES if chunk_bytes is None else chunk_bytes) // max(row_bytes, 1))


def chunks(job: Job, rows: int, ce_rows: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """Token indices of each chunk, and whether it is compared with the reference."""
    for start in range(0, job.held, rows):
        yield job.order[start : min(start + rows, job.held)], True
    for start in range(job.held, len(job.order), ce_rows):
        yield job.order[start : start + ce_rows], False


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
        operand = operand_dtype(hidden_NH, head_VH)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            sums, grads = run(hidden_NH, head, job, operand, needs)
        ctx.save_for_backward(*grads)
        loss, ce_sum, kl_sum = (total.clone() for total in sums)  # an output may not be a view
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return loss, ce_sum, kl_sum

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # On a CPU looking at the factor is free and saves a pass over the head's gradient; elsewhere it would wait.
        if grad.device.type == "cpu" and grad.item() == 1:
            return *ctx.saved_tensors, None
        return *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None


def run(
    hidden_NH: torch.Tensor, head: Head, job: Job, operand: torch.dtype, needs: list[bool]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Every chunk: (loss, sum of CE, sum of D), and the gradients of hidden states, head and bias where needed."""
    inputs = (hidden_NH, head.weight_VH, head.bias_V)
    dtype, device = wide(torch.promote_types(hidden_NH.dtype, head.weight_VH.dtype)), hidden_NH.device
    vocab, shared = len(head.weight_VH), 0 if job.ref is None else len(job.ref.weight_VH)
    rows = chunk_rows(vocab + shared, dtype, device, job.chunk_bytes)
    rows = min(rows, max(job.held if job.held else len(job.order), 1))
    buffer = torch.empty(rows * (vocab + shared), dtype=dtype, device=device)
    grads = [
        torch.zeros_like(x, dtype=dtype) if need and x is not None else None
        for need, x in zip(needs, inputs, strict=True)
    ]
    sums = torch.zeros(3, dtype=dtype, device=device)
    for index_R, compared in chunks(job, rows, len(buffer) // vocab):
        hidden_RH = hidden_NH[index_R]
        ce_R, kl_R = job.ce_N[index_R], job.kl_N[index_R]
        z_RV, ref_RS = logits(buffer, hidden_RH, job.ref_hidden_NH[index_R] if compared else None, head, job.ref, operand)
        value_R, divergence_R = job.row_function(
            z_RV,
            ref_RS,
            job.labels_N[index_R],
            ce_R,
            kl_R,
            divergence=job.divergence,
            softcap=head.softcap,
            ref_softcap=None if job.ref is None else job.ref.softcap,
            gradient=any(needs),
        )
        sums += torch.stack([ce_R @ value_R + kl_R @ divergence_R, value_R.sum(), divergence_R.sum()])
        if any(needs):
            accumulate_(grads, z_RV, hidden_RH, index_R, head, gradient_operand(operand))
    typed = [g if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
    return sums, typed


def logits(
    buffer: torch.Tensor,
    hidden_RH: torch.Tensor,
    ref_hidden_RH: torch.Tensor | None,
    head: Head,
    ref: Head | None,
    operand: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both models' logits of one chunk in `buffer`; one product where they share the head."""
    count, vocab = len(hidden_RH), len(head.weight_VH)
    z_RV = buffer[: count * vocab].view(count, vocab)
    if ref_hidden_RH is None or ref is None:
        project_(z_RV, hidden_RH, head, operand)
        return z_RV, None
    shared = len(ref.weight_VH)
    ref_RS = buffer[count * vocab : count * (vocab + shared)].view(count, shared)
    if same_head(head, ref) and ref_hidden_RH.dtype == hidden_RH.dtype:
        both_RV = buffer[: 2 * count * vocab].view(2 * count, vocab)
        project_(both_RV, torch.cat([hidden_RH, ref_hidden_RH]), head, operand)
    else:
        project_(z_RV, hidden_RH, head, operand)
        project_(ref_RS, ref_hidden_RH, ref, operand_dtype(ref_hidden_RH, ref.weight_VH))
    return z_RV, ref_RS


def accumulate_(
    grads: list[torch.Tensor | None],
    grad_RV: torch.Tensor,
    hidden_RH: torch.Tensor,
    index_R: torch.Tensor,
    head: Head,
    operand: torch.dtype,
) -> None:
    """The chain rule through the head, for one chunk."""
    grad_hidden_NH, grad_head_VH, grad_bias_V = grads
    if grad_hidden_NH is not None:
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=grad_hidden_NH.dtype)
        for part, weight_CH in cast_parts(head.weight_VH, operand):
            add_product_(grad_hidden_RH, grad_RV[:, part], weight_CH, head.scale)
        grad_hidden_NH[index_R] = grad_hidden_RH
    if grad_head_VH is not None:
        add_product_(grad_head_VH, grad_RV.t(), hidden_RH.to(operand), head.scale)
    if grad_bias_V is not None:
        grad_bias_V.add_(grad_RV.sum(0), alpha=head.scale)
