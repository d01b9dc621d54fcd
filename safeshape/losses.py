"""The objective, dense and readable: the truth that every faster implementation is tested against.

    L = (1/N) * sum_t [ ce_t * CE_t + kl_t * D_t ]

Shape suffixes: B rows, T predicted tokens, V vocabulary, S its rows that policy and reference share, M
tokens that are used (their label counts and one of their weights is not zero), K those of them with a kl weight.
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


AT_LABEL = ("k2", "k3")
NOT_SHARED = "are outside the rows that the two heads share"


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
    Vocabularies padded to different sizes share their first min(V, V_ref) rows. The divergence compares the two
    distributions on those rows, each renormalised over them; the cross-entropy is over all of the policy's rows, as
    in plain fine-tuning.
    Units: nats. The metrics are those that `LossOutput` names, over this batch.
    Errors: ValueError for an unknown divergence, shapes that do not match, kl weights without reference logits, or a
    label outside the shared rows where the divergence is read at the label (`k2`, `k3`).
    Source: STAR-DSS eq. 3 and adaptive regularisation, both as instances of one weighted sum.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
    for name, tensor in (("labels", labels_BT), ("ce weights", weights.ce_BT), ("kl weights", weights.kl_BT)):
        if tensor.shape != logits_BTV.shape[:2]:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, logits {tuple(logits_BTV.shape)}")
    used_BT = (labels_BT != IGNORE) & ((weights.ce_BT != 0) | (weights.kl_BT != 0))
    held_BT = used_BT & (weights.kl_BT != 0)
    labels_M = labels_BT[used_BT]
    logits_MV = logits_BTV[used_BT]
    ce_M = -label_logp(log_softmax(logits_MV), labels_M)
    total = (weights.ce_BT[used_BT].to(ce_M) * ce_M).sum()
    divergence_K = ce_M.new_zeros(0)
    if ref_logits_BTV is not None:
        shared = min(logits_BTV.shape[-1], ref_logits_BTV.shape[-1])
        outside = int((labels_BT[held_BT] >= shared).sum())
        if divergence in AT_LABEL and outside:
            raise ValueError(f"divergence {divergence!r} is read at the label, and {outside} labels {NOT_SHARED}")
        logp_KS = log_softmax(logits_BTV[held_BT][:, :shared])
        ref_logp_KS = log_softmax(ref_logits_BTV[held_BT][:, :shared].detach()).to(logp_KS)
        divergence_K = DIVERGENCES[divergence](logp_KS, ref_logp_KS, labels_BT[held_BT])
        total = total + (weights.kl_BT[held_BT].to(divergence_K) * divergence_K).sum()
    elif bool(held_BT.any()):
        raise ValueError("kl weights are not zero, but there are no reference logits")
    # An empty optimisation batch is a zero loss with a graph, not 0/0.
    loss = total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
    return LossOutput(
        loss=loss, metrics=mean_metrics(ce_M.detach().sum(), divergence_K.detach().sum(), used_BT, held_BT)
    )


def mean_metrics(
    ce_sum: torch.Tensor, kl_sum: torch.Tensor, used: torch.Tensor, held: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The metrics of `LossOutput` from sums over tokens; `used` and `held` mark the tokens each sum is over."""
    ce_tokens, kl_tokens = used.sum(), held.sum()
    return {
        "ce": ce_sum / ce_tokens.clamp(min=1),
        "kl": kl_sum / kl_tokens.clamp(min=1),
        "ce_tokens": ce_tokens,
        "kl_tokens": kl_tokens,
    }
