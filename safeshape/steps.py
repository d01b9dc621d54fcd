"""One micro-batch: reference pass, policy pass, weights, loss. It knows policies and references by their form only.

Shape suffixes: B rows, T predicted tokens, N response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import maybe_gather_lm_head_ctx

from safeshape.kernels import fused_label_logp, fused_shaped_loss
from safeshape.losses import label_logp, log_softmax, shaped_loss
from safeshape.models import Head, Reference, read_head
from safeshape.models.reference import Reader, counted_logits
from safeshape.policies import Batch, Policy
from safeshape.types import LossOutput, MicroBatch, Weights

RISK_BINS = 5  # of the logged histogram


@dataclass(frozen=True, kw_only=True)
class Step:
    """The loss of a micro-batch, the weights of its counted tokens, both of shape (N,), and the scores behind them."""

    out: LossOutput
    weights: Weights
    batch: MicroBatch


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is wanted of a micro-batch. `num_tokens`: N of the whole optimisation batch.

    `reader`: reads p_safe of the counted tokens off the reference's hidden states, in place of the data's.
    """

    policy: Policy
    reference: Reference | None
    batch_risk: float
    num_tokens: int | torch.Tensor
    reader: Reader | None = None


def policy_weights(objective: Objective, batch: MicroBatch, log_ratio_N: torch.Tensor | None) -> Weights:
    """The policy's weights for the counted tokens, shape (N,).

    Errors: ValueError when one is not a finite number.
    """
    log_ratio_BT = torch.zeros_like(batch.p_safe_BT)
    if log_ratio_N is not None:
        log_ratio_BT[batch.counted_BT] = log_ratio_N.to(log_ratio_BT)
    known = Batch(
        answer_p_safe_BT=batch.answer_p_safe_BT,
        position_BT=batch.position_BT,
        log_ratio_BT=log_ratio_BT,
        batch_risk=objective.batch_risk,
    )
    weights = objective.policy(batch.p_safe_BT, known)
    ce_N, kl_N = weights.ce_BT[batch.counted_BT], weights.kl_BT[batch.counted_BT]
    for name, weight_N in (("ce", ce_N), ("kl", kl_N)):
        if not bool(torch.isfinite(weight_N).all()):
            raise ValueError(f"policy {objective.policy.name!r} gave a {name} weight that is not a finite number")
    return Weights(ce_BT=ce_N, kl_BT=kl_N)


def dense_step(model: nn.Module, unwrapped: nn.Module, batch: MicroBatch, objective: Objective) -> Step:
    """Full logits of both models: the readable truth, and the way for models whose head cannot be read."""
    labels_N = batch.labels_BT[batch.counted_BT]
    ref_logits_NV = None
    if objective.reference is not None:
        ref_logits_NV = objective.reference.logits(model, unwrapped, batch)
        if objective.reader is not None:
            batch = with_p_safe(batch, objective.reference.states(model, unwrapped, batch, objective.reader).read_N)
    logits_NV = counted_logits(model, batch)
    log_ratio_N = None
    if objective.policy.needs_log_ratio and ref_logits_NV is not None:
        logp_N = label_logp(log_softmax(logits_NV.detach()), labels_N)
        log_ratio_N = logp_N - label_logp(log_softmax(ref_logits_NV), labels_N)
    weights = policy_weights(objective, batch, log_ratio_N)
    out = shaped_loss(
        logits_NV[None],
        None if ref_logits_NV is None else ref_logits_NV[None],
        labels_N[None],
        Weights(ce_BT=weights.ce_BT[None], kl_BT=weights.kl_BT[None]),
        divergence=objective.policy.divergence,
        num_tokens=objective.num_tokens,
    )
    return Step(out=out, weights=weights, batch=batch)


def fused_step(model: nn.Module, unwrapped: nn.Module, batch: MicroBatch, objective: Objective) -> Step:
    """The same loss from hidden states: response tokens are projected in pieces, inside the model's forward."""
    ref_hidden_NH = None
    if objective.reference is not None:
        states = objective.reference.states(model, unwrapped, batch, objective.reader)
        ref_hidden_NH, batch = states.hidden_NH, with_p_safe(batch, states.read_N)

    def shaped(causal: PreTrainedModel, output: BaseModelOutputWithPast) -> dict[str, torch.Tensor]:
        hidden_NH = output.last_hidden_state[:, :-1][batch.counted_BT]
        layer = causal.get_output_embeddings()
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):
            ref_head = None if objective.reference is None else objective.reference.head(unwrapped, causal)
            return _fused(batch, objective, hidden_NH, read_head(causal), ref_hidden_NH, ref_head)

    found = model(**batch.forward, shaped=shaped)
    names = ("ce", "kl", "ce_tokens", "kl_tokens")
    return Step(
        out=LossOutput(loss=found["loss"], metrics={name: found[name] for name in names}),
        weights=Weights(ce_BT=found["ce_weight"], kl_BT=found["kl_weight"]),
        batch=batch,
    )


def with_p_safe(batch: MicroBatch, p_safe_N: torch.Tensor | None) -> MicroBatch:
    """The batch with other scores on its counted tokens, as p_safe of token and answer; None changes nothing."""
    if p_safe_N is None:
        return batch
    p_safe_BT = torch.zeros_like(batch.p_safe_BT)
    p_safe_BT[batch.counted_BT] = p_safe_N.to(p_safe_BT)
    return replace(batch, p_safe_BT=p_safe_BT, answer_p_safe_BT=p_safe_BT)


def _fused(
    batch: MicroBatch,
    objective: Objective,
    hidden_NH: torch.Tensor,
    head: Head,
    ref_hidden_NH: torch.Tensor | None,
    ref_head: Head | None,
) -> dict[str, torch.Tensor]:
    labels_N = batch.labels_BT[batch.counted_BT]
    log_ratio_N = None
    if objective.policy.needs_log_ratio and ref_hidden_NH is not None and ref_head is not None:
        log_ratio_N = _logp(hidden_NH, head, labels_N) - _logp(ref_hidden_NH, ref_head, labels_N)
    weights = policy_weights(objective, batch, log_ratio_N)
    if ref_head is None or not bool(weights.kl_BT.any()):
        ref_hidden_NH, ref_head = None, None
    out = fused_shaped_loss(
        hidden_NH,
        head.weight_VH,
        ref_hidden_NH,
        None if ref_head is None else ref_head.weight_VH,
        labels_N,
        weights,
        divergence=objective.policy.divergence,
        num_tokens=objective.num_tokens,
        bias=head.bias_V,
        ref_bias=None if ref_head is None else ref_head.bias_V,
        logit_scale=head.scale,
        softcap=head.softcap,
        ref_logit_scale=None if ref_head is None else ref_head.scale,
        ref_softcap=None if ref_head is None else ref_head.softcap,
    )
    return {"loss": out.loss, **out.metrics, "ce_weight": weights.ce_BT, "kl_weight": weights.kl_BT}


def _logp(hidden_NH: torch.Tensor, head: Head, labels_N: torch.Tensor) -> torch.Tensor:
    return fused_label_logp(
        hidden_NH, head.weight_VH, labels_N, bias=head.bias_V, logit_scale=head.scale, softcap=head.softcap
    )


def token_sums(step: Step) -> dict[str, torch.Tensor]:
    """Sums over the counted tokens of what is logged, and the counts that make means of them, all detached."""
    batch, metrics, weights = step.batch, step.out.metrics, step.weights
    p_safe_N = batch.p_safe_BT[batch.counted_BT]
    bins_N = ((1 - p_safe_N) * RISK_BINS).long().clamp(max=RISK_BINS - 1)
    sums = {
        "tokens": torch.as_tensor(float(len(p_safe_N)), device=p_safe_N.device),
        "ce_tokens": metrics["ce_tokens"].float(),
        "kl_tokens": metrics["kl_tokens"].float(),
        "ce": metrics["ce"] * metrics["ce_tokens"],
        "kl": metrics["kl"] * metrics["kl_tokens"],
        "ce_weight": weights.ce_BT.sum(),
        "kl_weight": weights.kl_BT.sum(),
    }
    bins = {f"risk_hist/{b / RISK_BINS:.1f}": (bins_N == b).sum().float() for b in range(RISK_BINS)}
    return {name: value.detach() for name, value in (sums | bins).items()}


class TokenMeans:
    """Token-weighted means of what the steps of each mode ("train", "eval") report, since they were taken last."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}

    def add(self, mode: str, step: Step) -> None:
        """Count one micro-batch."""
        for name, value in token_sums(step).items():
            self._sums[mode][name] = self._sums[mode].get(name, 0.0) + value

    def take(self, mode: str, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means over all processes, whose sums `reduce` adds up; counting starts anew."""
        sums = {name: float(reduce(value)) for name, value in self._sums[mode].items()}
        self._sums[mode] = {}
        tokens = {name: max(sums.pop(f"{name}tokens", 0.0), 1.0) for name in ("", "ce_", "kl_")}
        return {name: value / tokens.get(f"{name}_", tokens[""]) for name, value in sums.items()}
