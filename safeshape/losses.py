"""The objective, dense and readable: the truth that every faster implementation is tested against.

    L = (1/N) * sum_t [ ce_t * CE_t + kl_t * D_t ]

Shape suffixes: B rows, T predicted tokens, V vocabulary, M tokens of the batch whose label counts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from safeshape.types import IGNORE, Divergence, LossOutput, Weights


def reverse_kl(logp_MV: torch.Tensor, ref_logp_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """KL(pi_theta || pi_ref) over the full vocabulary, in nats per token (STAR-DSS, arXiv 2505.17196, eq. 3)."""
    return F.kl_div(ref_logp_MV, logp_MV, log_target=True, reduction="none").sum(-1)


def forward_kl(logp_MV: torch.Tensor, ref_logp_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """KL(pi_ref || pi_theta) over the full vocabulary, in nats per token (adaptive regularisation, 2602.17546)."""
    return F.kl_div(logp_MV, ref_logp_MV, log_target=True, reduction="none").sum(-1)


def k2(logp_MV: torch.Tensor, ref_logp_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """0.5 * (log pi_theta(y) - log pi_ref(y))^2 at the label token.

    Differs: not an unbiased estimate of a KL here, because the labels are training data and not samples of pi_theta;
    it is the form of the STAR-DSS authors' released code.
    """
    return 0.5 * (label_logp(logp_MV, labels_M) - label_logp(ref_logp_MV, labels_M)).square()


def k3(logp_MV: torch.Tensor, ref_logp_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d with d = log pi_ref(y) - log pi_theta(y) at the label token. Never negative."""
    d_M = label_logp(ref_logp_MV, labels_M) - label_logp(logp_MV, labels_M)
    return torch.expm1(d_M) - d_M


DIVERGENCES: dict[Divergence, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "k2": k2,
    "k3": k3,
}


def label_logp(logp_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """The log-probability of each label."""
    return logp_MV.gather(-1, labels_M[..., None])[..., 0]


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in at least float32: in bfloat16 a KL of 1e-5 reads five times too large."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def shaped_loss(
    logits_BTV: torch.Tensor,
    ref_logits_BTV: torch.Tensor | None,
    labels_BT: torch.Tensor,
    weights: Weights,
    *,
    divergence: Divergence = "reverse",
    num_tokens: int | torch.Tensor,
) -> LossOutput:
    """Weighted cross-entropy plus weighted divergence from the frozen reference, over `num_tokens`.

    Shapes: `logits_BTV[:, t]` predicts `labels_BT[:, t]` (the caller shifts); labels of -100 are ignored, whatever
    their weights. `num_tokens` is N, the response tokens of the whole optimisation batch: all ranks, all accumulation
    steps; both terms are divided by it. `ref_logits_BTV` may be None where no divergence is wanted.
    Units: nats. `metrics["ce"]` and `metrics["kl"]` are unweighted means over this batch's counted tokens.
    Errors: ValueError for an unknown divergence, shapes that do not match, or kl weights without reference logits.
    Source: STAR-DSS eq. 3 and adaptive regularisation, both as instances of one weighted sum.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
    for name, tensor in (("labels", labels_BT), ("ce weights", weights.ce_BT), ("kl weights", weights.kl_BT)):
        if tensor.shape != logits_BTV.shape[:2]:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, logits {tuple(logits_BTV.shape)}")
    counted_BT = labels_BT != IGNORE
    labels_M = labels_BT[counted_BT]
    logp_MV = log_softmax(logits_BTV[counted_BT])
    ce_weight_M, kl_weight_M = weights.ce_BT[counted_BT].to(logp_MV), weights.kl_BT[counted_BT].to(logp_MV)
    ce_M = -label_logp(logp_MV, labels_M)
    total = (ce_weight_M * ce_M).sum()
    divergence_M = torch.zeros_like(ce_M)
    if ref_logits_BTV is not None:
        ref_logp_MV = log_softmax(ref_logits_BTV[counted_BT].detach())
        divergence_M = DIVERGENCES[divergence](logp_MV, ref_logp_MV, labels_M)
        total = total + (kl_weight_M * divergence_M).sum()
    elif bool(kl_weight_M.any()):
        raise ValueError("kl weights are not zero, but there are no reference logits")
    count = counted_BT.sum().clamp(min=1)
    # An empty optimisation batch is a zero loss with a graph, not 0/0.
    loss = total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
    return LossOutput(
        loss=loss,
        metrics={"ce": ce_M.detach().sum() / count, "kl": divergence_M.detach().sum() / count},
    )
