"""The shipped defences, and how a name or a YAML mapping becomes one."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from safeshape.config.naming import check_parameters, named
from safeshape.defences.arithmetic import lox, resta
from safeshape.defences.averaging import ema
from safeshape.defences.data import drop_risky, ptst, safe_instruct
from safeshape.defences.embedding import t_vaccine, vaccine
from safeshape.defences.freezing import sppft
from safeshape.defences.hardening import booster, repnoise
from safeshape.defences.lisa import lisa
from safeshape.defences.patching import one_shot
from safeshape.defences.projection import asft, safe_lora, safe_merge
from safeshape.defences.pruning import antidote, safe_delta
from safeshape.defences.records import Defence
from safeshape.defences.surgery import safe_grad
from safeshape.defences.weighting import antibody, bds, seal
from safeshape.policies import POLICIES, resolve_policy

Maker = Callable[..., Defence]

_SOURCES = {
    "sft": "plain fine-tuning: no defence",
    "fixed_kl": "uniform KL constraint: control",
    "rejection": "static shaping (RS), arXiv 2505.17196",
    "soft_weight": "control",
    "star": "STAR-DSS, arXiv 2505.17196, eq. 3",
    "star_weight": "STAR-DSS without its divergence: ablation",
    "adaptive": "adaptive regularisation, arXiv 2602.17546",
    "adaptive_weight": "adaptive regularisation without its divergence: ablation",
    "constrained": "Constrained SFT, arXiv 2406.05946",
}
_SCORED_BY = {
    "star": ("guard",),
    "star_weight": ("guard",),
    "adaptive": ("probe", "judge"),
    "adaptive_weight": ("probe", "judge"),
}


def _policy_defence(name: str) -> Maker:
    def make(**parameters: Any) -> Defence:
        policy = resolve_policy({"name": name, **parameters})
        differs = (inspect.getdoc(POLICIES[name]) or "").partition("Differs:")[2]
        return Defence(
            name=name,
            stage="fine-tuning",
            source=_SOURCES.get(name, "a policy of this package"),
            differs=" ".join(differs.split()).rstrip("."),
            needs=frozenset({"scores"} if policy.needs_signal else ()),
            scores_by=_SCORED_BY.get(name, ("guard", "judge", "probe")) if policy.needs_signal else (),
            policy={"name": name, **parameters},
        )

    return make


DEFENCES: dict[str, Maker] = {
    **{name: _policy_defence(name) for name in POLICIES},
    "drop_risky": drop_risky,
    "safe_instruct": safe_instruct,
    "ptst": ptst,
    "sppft": sppft,
    "ema": ema,
    "lisa": lisa,
    "safe_grad": safe_grad,
    "asft": asft,
    "antibody": antibody,
    "bds": bds,
    "seal": seal,
    "lox": lox,
    "safe_lora": safe_lora,
    "safe_merge": safe_merge,
    "resta": resta,
    "antidote": antidote,
    "safe_delta": safe_delta,
    "one_shot": one_shot,
    "vaccine": vaccine,
    "t_vaccine": t_vaccine,
    "booster": booster,
    "repnoise": repnoise,
}


def resolve_defence(spec: str | Mapping[str, Any] | Defence) -> Defence:
    """Turn `"lisa"`, `{"name": "lisa", "rho": 0.5}`, `"module:function"` or a value into a defence.

    Errors: ValueError that names the unknown defence, parameter or value.
    """
    if isinstance(spec, Defence):
        return spec
    parameters = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = parameters.pop("name", None)
    maker = named(name, DEFENCES, "defence")
    if not callable(maker):
        raise ValueError(f"{name!r} is not a function")
    if name not in POLICIES:  # which check their own
        check_parameters(maker, parameters, f"defence {name!r}", given=())
    try:
        inspect.signature(maker).bind(**parameters)
    except TypeError as error:
        raise ValueError(f"defence {name!r}: {error}") from error
    found = maker(**parameters)
    if not isinstance(found, Defence):
        raise ValueError(f"{name!r} does not give a Defence but {type(found).__name__}")
    return replace(found, parameters=parameters)
