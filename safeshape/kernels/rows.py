"""One chunk of logits to losses and, in place, to the gradient: the pure-torch row function.

Everything a row needs is computed from unnormalised exponentials `exp(z - max)` and a few numbers per row, so that
each exponential is taken once and the buffer of the logits becomes the buffer of the gradient. Rows are worked on in
blocks that stay in a core's cache through all passes. Differences between policy and reference are taken before
anything is added up (`top - ref_top`, `log(total / ref_total)`): two models that are close give a small divergence
with a small error.

Shape suffixes: R rows (tokens) of a chunk, V rows of the policy's head, S those that the reference shares, 1 one
column.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from safeshape.types import Divergence

BLOCK_BYTES = (
    3 * 2**19
)  # of logits, reference logits and scratch, per thread: what stays in a core's second-level cache


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Both models on a block of rows: divergence D and what its gradient needs.

    `z` now holds exp(z - top) and `total_R1` its sum. dD/dz = slope * z + other * ref, plus `label` at the label.
    """

    top_R1: torch.Tensor
    total_R1: torch.Tensor
    value_R1: torch.Tensor
    slope_R1: torch.Tensor
    other_R1: torch.Tensor | None = None
    label_R1: torch.Tensor | None = None


def exponentials_(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(z - max) in place; the maximum and the sum of each row."""
    top_R1 = logits_RV.amax(-1, keepdim=True)
    return top_R1, logits_RV.sub_(top_R1).exp_().sum(-1, keepdim=True)


def reverse(z_RS: torch.Tensor, ref_RS: torch.Tensor, labels_R1: torch.Tensor, scratch_RS: torch.Tensor) -> Compared:
    """D = sum p (log p - log q); dD/dz = p (log p - log q - D), in which any constant cancels."""
    ref_top_R1 = ref_RS.amax(-1, keepdim=True)
    ref_total_R1 = torch.sub(ref_RS, ref_top_R1, out=scratch_RS).exp_().sum(-1, keepdim=True)
    torch.sub(z_RS, ref_RS, out=ref_RS)
    top_R1, total_R1 = exponentials_(z_RS)
    mean_R1 = ref_RS.mul_(z_RS).sum(-1, keepdim=True) / total_R1
    return Compared(
        top_R1=top_R1,
        total_R1=total_R1,
        value_R1=mean_R1 - (top_R1 - ref_top_R1) - torch.log(total_R1 / ref_total_R1),
        slope_R1=-mean_R1 / total_R1,
        other_R1=1 / total_R1,
    )


def forward(z_RS: torch.Tensor, ref_RS: torch.Tensor, labels_R1: torch.Tensor, scratch_RS: torch.Tensor) -> Compared:
    """D = sum q (log q - log p); dD/dz = p - q."""
    torch.sub(ref_RS, z_RS, out=scratch_RS)
    ref_top_R1, ref_total_R1 = exponentials_(ref_RS)
    mean_R1 = scratch_RS.mul_(ref_RS).sum(-1, keepdim=True) / ref_total_R1
    top_R1, total_R1 = exponentials_(z_RS)
    return Compared(
        top_R1=top_R1,
        total_R1=total_R1,
        value_R1=mean_R1 - (ref_top_R1 - top_R1) - torch.log(ref_total_R1 / total_R1),
        slope_R1=1 / total_R1,
        other_R1=-1 / ref_total_R1,
    )


def at_label(
    z_RS: torch.Tensor, ref_RS: torch.Tensor, labels_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d = log q(y) - log p(y), and the statistics of the policy."""
    d_R1 = ref_RS.gather(-1, labels_R1) - z_RS.gather(-1, labels_R1)
    top_R1, total_R1 = exponentials_(z_RS)
    ref_top_R1, ref_total_R1 = exponentials_(ref_RS)
    return d_R1 + (top_R1 - ref_top_R1) + torch.log(total_R1 / ref_total_R1), top_R1, total_R1


def k2(z_RS: torch.Tensor, ref_RS: torch.Tensor, labels_R1: torch.Tensor, scratch_RS: torch.Tensor) -> Compared:
    """D = d^2 / 2; dD/dz = -d (onehot - p)."""
    d_R1, top_R1, total_R1 = at_label(z_RS, ref_RS, labels_R1)
    return Compared(
        top_R1=top_R1, total_R1=total_R1, value_R1=0.5 * d_R1.square(), slope_R1=d_R1 / total_R1, label_R1=-d_R1
    )


def k3(z_RS: torch.Tensor, ref_RS: torch.Tensor, labels_R1: torch.Tensor, scratch_RS: torch.Tensor) -> Compared:
    """D = exp(d) - 1 - d; dD/dz = -(exp(d) - 1) (onehot - p)."""
    d_R1, top_R1, total_R1 = at_label(z_RS, ref_RS, labels_R1)
    rate_R1 = torch.expm1(d_R1)
    return Compared(
        top_R1=top_R1, total_R1=total_R1, value_R1=rate_R1 - d_R1, slope_R1=rate_R1 / total_R1, label_R1=-rate_R1
    )


COMPARE: dict[Divergence, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Compared]] = {
    "reverse": reverse,
    "forward": forward,
    "k2": k2,
    "k3": k3,
}


def softcap_(logits_RV: torch.Tensor, softcap: float | None) -> None:
    """softcap * tanh(z / softcap), in place."""
    if softcap is not None:
        logits_RV.div_(softcap).tanh_().mul_(softcap)


def block_rows(count: int, columns: int, like: torch.Tensor) -> int:
    """Rows of a block: as many as fit into the cache on a CPU, all of them elsewhere."""
    if like.device.type != "cpu":
        return max(count, 1)
    return max(1, BLOCK_BYTES * torch.get_num_threads() // (3 * columns * like.element_size()))


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
    """Cross-entropy and divergence of each row; `z_RV` becomes d(sum of ce * CE + kl * D)/dz, before the softcap.

    Without `gradient` the buffers' contents are undefined afterwards, as `ref_RS`'s are in any case.
    """
    value_R, divergence_R = torch.empty_like(ce_R), torch.zeros_like(kl_R)
    step = block_rows(len(z_RV), z_RV.shape[1], z_RV)
    scratch_RS = None if ref_RS is None else torch.empty_like(ref_RS[:step])
    for start in range(0, len(z_RV), step):
        part = slice(start, start + step)
        z, labels_R1, ce_R1, kl_R1 = z_RV[part], labels_R[part, None], ce_R[part, None], kl_R[part, None]
        softcap_(z, softcap)
        bend_RV = None if softcap is None or not gradient else 1 - (z / softcap).square()
        label_logit_R1 = z.gather(-1, labels_R1)
        compared = None
        if ref_RS is None or scratch_RS is None:
            top_R1, total_R1 = exponentials_(z)
            shared = z.shape[1]
        else:
            shared = ref_RS.shape[1]
            softcap_(ref_RS[part], ref_softcap)
            compared = COMPARE[divergence](z[:, :shared], ref_RS[part], labels_R1, scratch_RS[: len(z)])
            top_R1, total_R1 = compared.top_R1, compared.total_R1
            divergence_R[part] = compared.value_R1[:, 0]
        log_total_R1 = torch.log(total_R1)
        scale_R1 = 1 / total_R1  # exp(z - top) times this is the probability among all of the policy's rows
        tail = z[:, shared:]
        if tail.shape[1]:
            log_total_R1 = torch.logaddexp(log_total_R1, torch.logsumexp(tail, -1, keepdim=True) - top_R1)
            scale_R1 = torch.exp(-log_total_R1)
        value_R[part] = ((top_R1 - label_logit_R1) + log_total_R1)[:, 0]
        if not gradient:
            continue
        if tail.shape[1]:
            tail.sub_(top_R1 + log_total_R1).exp_().mul_(ce_R1)
        slope_R1, label_R1 = ce_R1 * scale_R1, -ce_R1
        if compared is not None:
            slope_R1 = slope_R1 + kl_R1 * compared.slope_R1
            label_R1 = label_R1 if compared.label_R1 is None else label_R1 + kl_R1 * compared.label_R1
        z[:, :shared].mul_(slope_R1)
        if compared is not None and compared.other_R1 is not None and ref_RS is not None:
            z[:, :shared].addcmul_(ref_RS[part], kl_R1 * compared.other_R1)
        z.scatter_add_(-1, labels_R1, label_R1)
        if bend_RV is not None:
            z.mul_(bend_RV)
    return value_R, divergence_R
