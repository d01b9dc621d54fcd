"""One chunk of logits to losses and, in place, to the gradient: one Triton program per row, for CUDA.

The twin of `safeshape.kernels.rows.rows_`: the same arguments, results and formulas. Pass 1 reads the row once and
keeps running statistics of both models; pass 2 reads it again and writes the gradient over the policy's logits. It has
been run by Triton's interpreter on a CPU and compiled for sm_90, but never run on a GPU.

Shape suffixes: R rows (tokens) of a chunk, V rows of the policy's head, S those that the reference shares. In the
kernels, names without a suffix are one row's numbers, or one block of its columns.
"""
# Triton reads the annotations of a kernel itself and knows no others than its own.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from safeshape.types import Divergence

BLOCK = 4096  # columns at a time
MODES: dict[Divergence, int] = {"reverse": 0, "forward": 1, "k2": 2, "k3": 3}


@triton.jit
def capped(z, softcap, CAP: tl.constexpr):
    """softcap * tanh(z / softcap), with tanh(x) = 2 sigmoid(2x) - 1."""
    if CAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z


@triton.jit
def block(row_ptr, start, end, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets, mask and logits of the columns from `start`; -inf past the end."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < end
    z = capped(tl.load(row_ptr + offsets, mask=mask, other=0.0), softcap, CAP)
    return offsets, mask, tl.where(mask, z, -float("inf"))


@triton.jit
def statistics(
    z_ptr,
    ref_ptr,
    shared,
    softcap,
    ref_softcap,
    CAP: tl.constexpr,
    REF_CAP: tl.constexpr,
    REF: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running max and sum of exponentials of both models, and the exponentially weighted sum of their difference."""
    zero = tl.full((), 0, z_ptr.dtype.element_ty)
    top, total, ref_top, ref_total, cross = zero - float("inf"), zero, zero - float("inf"), zero, zero
    for start in range(0, shared, BLOCK):
        _, mask, z = block(z_ptr, start, shared, softcap, CAP, BLOCK)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        e = tl.exp(z - new_top)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(e, axis=0)
        top = new_top
        if REF:
            _, _, ref = block(ref_ptr, start, shared, ref_softcap, REF_CAP, BLOCK)
            new_ref_top = tl.maximum(ref_top, tl.max(ref, axis=0))
            ref_e = tl.exp(ref - new_ref_top)
            ref_shrink = tl.exp(ref_top - new_ref_top)
            ref_total = ref_total * ref_shrink + tl.sum(ref_e, axis=0)
            ref_top = new_ref_top
            if MODE == 0:
                cross = cross * shrink + tl.sum(e * tl.where(mask, z - ref, 0.0), axis=0)
            if MODE == 1:
                cross = cross * ref_shrink + tl.sum(ref_e * tl.where(mask, ref - z, 0.0), axis=0)
    return top, total, ref_top, ref_total, cross


@triton.jit
def compared(label_gap, top, total, ref_top, ref_total, cross, MODE: tl.constexpr):
    """D, and dD/dz = slope * exp(z - top) + other * (what pass 2 multiplies it with), plus `at_label` at the label."""
    gap = (top - ref_top) + tl.log(total / ref_total)
    if MODE == 0:
        mean = cross / total
        return mean - gap, -mean / total, 1 / total, mean * 0
    if MODE == 1:
        mean = cross / ref_total
        return mean + gap, 1 / total, -1 / ref_total, mean * 0
    d = label_gap + gap
    if MODE == 2:
        return 0.5 * d * d, d / total, d * 0, -d
    # exp(d) - 1 - d loses all its digits where d is small; the next term of the series is below d^6 / 720.
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d / 120)))
    value = tl.where(tl.abs(d) < 0.01, series, tl.exp(d) - 1 - d)
    return value, (value + d) / total, d * 0, -(value + d)


@triton.jit
def write_gradient(
    z_ptr,
    ref_ptr,
    shared,
    vocab,
    label,
    top,
    ref_top,
    lse,
    ce,
    slope,
    other,
    at_label,
    softcap,
    ref_softcap,
    CAP: tl.constexpr,
    REF_CAP: tl.constexpr,
    REF: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 2: the gradient over the logits."""
    for start in range(0, vocab, BLOCK):
        offsets, mask, z = block(z_ptr, start, vocab, softcap, CAP, BLOCK)
        both = offsets < shared
        e = tl.exp(tl.where(both, z - top, -float("inf")))
        grad = e * slope
        if REF and MODE < 2:
            _, _, ref = block(ref_ptr, start, shared, ref_softcap, REF_CAP, BLOCK)
            if MODE == 0:
                grad += e * tl.where(both, z - ref, 0.0) * other
            else:
                grad += tl.exp(tl.where(both, ref - ref_top, -float("inf"))) * other
        grad += tl.where(both, 0.0, tl.exp(z - lse) * ce)
        grad += tl.where(offsets == label, at_label, 0.0)
        if CAP:
            grad *= tl.where(mask, 1 - (z / softcap) * (z / softcap), 0.0)
        tl.store(z_ptr + offsets, grad, mask=mask)


@triton.jit
def row_kernel(
    z_ptr,
    ref_ptr,
    label_ptr,
    ce_ptr,
    kl_ptr,
    value_ptr,
    divergence_ptr,
    vocab,
    shared,
    softcap,
    ref_softcap,
    CAP: tl.constexpr,
    REF_CAP: tl.constexpr,
    REF: tl.constexpr,
    TAIL: tl.constexpr,
    MODE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: both losses, and the gradient in place."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    ref_ptr += row * shared
    label, ce, kl = tl.load(label_ptr + row), tl.load(ce_ptr + row), tl.load(kl_ptr + row)
    label_logit = capped(tl.load(z_ptr + label), softcap, CAP)
    top, total, ref_top, ref_total, cross = statistics(
        z_ptr, ref_ptr, shared, softcap, ref_softcap, CAP, REF_CAP, REF, MODE, BLOCK
    )
    log_total = tl.log(total)
    if TAIL:
        tail_top, tail_total, _, _, _ = statistics(
            z_ptr + shared, ref_ptr, vocab - shared, softcap, ref_softcap, CAP, REF_CAP, False, MODE, BLOCK
        )
        tail = tail_top + tl.log(tail_total) - top
        most = tl.maximum(log_total, tail)
        log_total = most + tl.log(tl.exp(log_total - most) + tl.exp(tail - most))
    tl.store(value_ptr + row, (top - label_logit) + log_total)
    slope, other, at_label = ce * tl.exp(-log_total), ce * 0, -ce
    if REF:
        label_gap = ce * 0
        if MODE > 1:
            label_gap = capped(tl.load(ref_ptr + label), ref_softcap, REF_CAP) - label_logit
        value, its_slope, its_other, its_label = compared(label_gap, top, total, ref_top, ref_total, cross, MODE)
        tl.store(divergence_ptr + row, value)
        slope, other, at_label = slope + kl * its_slope, kl * its_other, at_label + kl * its_label
    if GRADIENT:
        # Every read of this row by pass 1 comes before the first write, also by other threads of the program.
        tl.debug_barrier()
        write_gradient(
            z_ptr, ref_ptr, shared, vocab, label, top, ref_top, top + log_total, ce, slope, other, at_label,
            softcap, ref_softcap, CAP, REF_CAP, REF, MODE, BLOCK,
        )  # fmt: skip


def rows_(
    z_RV: torch.Tensor,
    ref_RS: torch.Tensor | None,
    labels_R: torch.Tensor,
    ce_R: torch.Tensor,
    kl_R: torch.Tensor,
    *,
    divergence: Divergence,
    softcap: float | None,
    ref_softcap: float | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and divergence of each row; `z_RV` becomes the gradient, as in `safeshape.kernels.rows.rows_`."""
    value_R, divergence_R = torch.empty_like(ce_R), torch.zeros_like(kl_R)
    vocab = z_RV.shape[1]
    shared = vocab if ref_RS is None else ref_RS.shape[1]
    row_kernel[(len(z_RV),)](
        z_RV,
        z_RV if ref_RS is None else ref_RS,
        labels_R,
        ce_R,
        kl_R,
        value_R,
        divergence_R,
        vocab,
        shared,
        1.0 if softcap is None else softcap,
        1.0 if ref_softcap is None else ref_softcap,
        CAP=softcap is not None,
        REF_CAP=ref_softcap is not None,
        REF=ref_RS is not None,
        TAIL=shared < vocab,
        MODE=MODES[divergence],
        GRADIENT=gradient,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
    )
    return value_R, divergence_R
