"""Policies: what to do about a risk. Pure functions from the probability of being safe to per-token weights.

Shape suffixes: B rows, T predicted tokens. Every function returns `Weights(ce_BT, kl_BT)`; the trainer multiplies the
cross-entropy and the divergence from the frozen reference by them. A user's own policy is any function of the same
form: `def mine(p_safe_BT, *, batch, **parameters) -> Weights`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from safeshape.config.naming import check_parameters, named
from safeshape.types import Divergence, Weights


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a policy may know beside the token scores; all tensors are detached.

    `answer_p_safe_BT`: the score of the whole answer, on each of its tokens. `position_BT`: 1 for the first response
    token, 2 for the next, 0 elsewhere. `log_ratio_BT`: log pi_theta(y) - log pi_ref(y) at the label, zeros without a
    reference. `batch_risk`: mean over the examples of the global optimisation batch of 1 - p_safe, smoothed by the
    trainer where the policy asks for it.
    """

    answer_p_safe_BT: torch.Tensor
    position_BT: torch.Tensor
    log_ratio_BT: torch.Tensor
    batch_risk: float


def sft(p_safe_BT: torch.Tensor, *, batch: Batch | None = None) -> Weights:
    """Plain fine-tuning: every token is learned; equals TRL's SFTTrainer."""
    return Weights(ce_BT=torch.ones_like(p_safe_BT), kl_BT=torch.zeros_like(p_safe_BT))


def fixed_kl(p_safe_BT: torch.Tensor, *, batch: Batch | None = None, beta: float = 0.5) -> Weights:
    """The same constraint on every token: ce = 1 - beta, kl = beta, whatever the risk."""
    _within("beta", beta, 0.0, 1.0)
    return Weights(ce_BT=torch.full_like(p_safe_BT, 1 - beta), kl_BT=torch.full_like(p_safe_BT, beta))


def rejection(p_safe_BT: torch.Tensor, *, batch: Batch, threshold: float = 0.5) -> Weights:
    """Static shaping (RS): an answer whose score as a whole is below the threshold gets weight zero.

    Its tokens still count in N, as in the STAR-DSS authors' released code.
    """
    _within("threshold", threshold, 0.0, 1.0)
    keep_BT = (batch.answer_p_safe_BT >= threshold).to(p_safe_BT)
    return Weights(ce_BT=keep_BT, kl_BT=torch.zeros_like(p_safe_BT))


def soft_weight(p_safe_BT: torch.Tensor, *, batch: Batch) -> Weights:
    """Control: the score of the whole answer as its weight, no divergence."""
    return Weights(ce_BT=batch.answer_p_safe_BT.clone(), kl_BT=torch.zeros_like(p_safe_BT))


def star(p_safe_BT: torch.Tensor, *, batch: Batch | None = None, kl: float = 0.5) -> Weights:
    """STAR-DSS, arXiv 2505.17196, eq. 3: ce = V, kl = kl * (1 - V), V the score at the end of the token's chunk.

    `divergence="k2"` beside the policy is the released code's form; its weight is the same.
    """
    _within("kl", kl, 0.0, float("inf"))
    return Weights(ce_BT=p_safe_BT.clone(), kl_BT=kl * (1 - p_safe_BT))


def star_weight(p_safe_BT: torch.Tensor, *, batch: Batch | None = None) -> Weights:
    """Ablation of STAR-DSS without its divergence: ce = V."""
    return Weights(ce_BT=p_safe_BT.clone(), kl_BT=torch.zeros_like(p_safe_BT))


def adaptive(
    p_safe_BT: torch.Tensor,
    *,
    batch: Batch,
    beta_min: float = 0.1,
    beta_max: float = 0.9,
    ema: float = 0.0,
    scope: Literal["example", "batch"] = "example",
    ramp: Literal["affine", "clamp"] = "affine",
) -> Weights:
    """Adaptive regularisation, arXiv 2602.17546: ce = 1 - beta, kl = beta, beta rising with the risk.

    `scope="batch"` uses the mean risk of the global optimisation batch (the paper), smoothed over steps by the trainer
    as s_t = ema * s_{t-1} + (1 - ema) * s_t; `scope="example"` uses each answer's own risk. `ramp="affine"`:
    beta_min + (beta_max - beta_min) * risk. `ramp="clamp"`: clip((r - 2) / 3, beta_min, beta_max) with r = 1 + 4 * risk
    on the judge's 1-5 scale, as in the released code.
    Differs: example scope is the default, because the paper's code runs micro-batches of one example; the weight 1 -
    beta is not clamped a second time (at the defaults the code's clamp changes nothing).
    """
    _within("beta_min", beta_min, 0.0, 1.0)
    _within("beta_max", beta_max, beta_min, 1.0)
    _within("ema", ema, 0.0, 1.0)
    _one_of("scope", scope, ("example", "batch"))
    _one_of("ramp", ramp, ("affine", "clamp"))
    if ema and scope == "example":
        raise ValueError("ema smooths the risk of successive batches; it needs scope='batch'")
    risk_BT = 1 - batch.answer_p_safe_BT if scope == "example" else torch.full_like(p_safe_BT, batch.batch_risk)
    if ramp == "affine":
        beta_BT = beta_min + (beta_max - beta_min) * risk_BT
    else:
        beta_BT = ((4 * risk_BT - 1) / 3).clamp(beta_min, beta_max)
    return Weights(ce_BT=1 - beta_BT, kl_BT=beta_BT)


def adaptive_weight(
    p_safe_BT: torch.Tensor,
    *,
    batch: Batch,
    beta_min: float = 0.1,
    beta_max: float = 0.9,
    ema: float = 0.0,
    scope: Literal["example", "batch"] = "example",
    ramp: Literal["affine", "clamp"] = "affine",
) -> Weights:
    """Ablation of adaptive regularisation without its divergence: ce = 1 - beta, kl = 0."""
    weights = adaptive(p_safe_BT, batch=batch, beta_min=beta_min, beta_max=beta_max, ema=ema, scope=scope, ramp=ramp)
    return Weights(ce_BT=weights.ce_BT, kl_BT=torch.zeros_like(p_safe_BT))


def constrained(
    p_safe_BT: torch.Tensor,
    *,
    batch: Batch,
    beta_1: float = 0.5,
    beta_2_5: float = 2.0,
    beta_rest: float = 0.1,
) -> Weights:
    """Constrained SFT, arXiv 2406.05946: ce = 2 * (1 - sigmoid(b_t * (log pi_theta - log pi_ref))), detached.

    Its gradient equals that of the paper's loss; b_t is beta_1 for the first response token, beta_2_5 for the next
    four and beta_rest after.
    Differs: no lower bound of 1e-3 on the weight (the released code has one).
    """
    for name, value in (("beta_1", beta_1), ("beta_2_5", beta_2_5), ("beta_rest", beta_rest)):
        _within(name, value, 0.0, float("inf"))
    beta_BT = torch.full_like(p_safe_BT, beta_rest)
    beta_BT[batch.position_BT <= 5] = beta_2_5
    beta_BT[batch.position_BT <= 1] = beta_1
    ce_BT = 2 * (1 - torch.sigmoid(beta_BT * batch.log_ratio_BT.to(beta_BT)))
    return Weights(ce_BT=ce_BT, kl_BT=torch.zeros_like(p_safe_BT))


PolicyFunction = Callable[..., Weights]

POLICIES: dict[str, PolicyFunction] = {
    "sft": sft,
    "fixed_kl": fixed_kl,
    "rejection": rejection,
    "soft_weight": soft_weight,
    "star": star,
    "star_weight": star_weight,
    "adaptive": adaptive,
    "adaptive_weight": adaptive_weight,
    "constrained": constrained,
}
FORWARD_KL = frozenset({"fixed_kl", "adaptive"})
NEEDS_NO_REFERENCE = frozenset({"sft", "rejection", "soft_weight", "star_weight", "adaptive_weight"})
NEEDS_NO_SIGNAL = frozenset({"sft", "fixed_kl", "constrained"})
NEEDS_LOG_RATIO = frozenset({"constrained"})


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy with its parameters, ready to be called by the trainer."""

    name: str
    function: PolicyFunction
    parameters: Mapping[str, Any]
    divergence: Divergence
    needs_reference: bool
    needs_signal: bool
    needs_log_ratio: bool

    def __call__(self, p_safe_BT: torch.Tensor, batch: Batch) -> Weights:
        return self.function(p_safe_BT, batch=batch, **self.parameters)


def resolve_policy(spec: str | Mapping[str, Any] | PolicyFunction) -> Policy:
    """Turn `"star"`, `{"name": "star", "kl": 0.5, "divergence": "k2"}`, `"module:function"` or a function into one.

    A shipped policy is tried on one token, so that a bad value is refused before any model is loaded.
    Errors: ValueError that names the unknown policy, parameter or value.
    """
    parameters = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    given = parameters.pop("name", "")
    name = f"{given.__module__}:{given.__qualname__}" if callable(given) else given
    function: PolicyFunction = given if callable(given) else named(given, POLICIES, "policy")
    divergence: Any = parameters.pop("divergence", "forward" if name in FORWARD_KL else "reverse")
    _one_of("divergence", divergence, get_args(Divergence))
    check_parameters(function, parameters, f"policy {name!r}", given=("p_safe_BT", "batch"))
    shipped = name in POLICIES
    policy = Policy(
        name=name,
        function=function,
        parameters=parameters,
        divergence=divergence,
        needs_reference=name not in NEEDS_NO_REFERENCE,
        needs_signal=name not in NEEDS_NO_SIGNAL,
        needs_log_ratio=not shipped or name in NEEDS_LOG_RATIO,
    )
    if shipped:
        one = torch.ones(1, 1)
        policy(one, Batch(answer_p_safe_BT=one, position_BT=one.long(), log_ratio_BT=0 * one, batch_risk=0.0))
    return policy


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
