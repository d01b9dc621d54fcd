"""Every policy on numbers that can be checked by hand; every knob changes them."""

import math

import pytest
import torch

from safeshape.policies import POLICIES, Batch, resolve_policy
from safeshape.types import Weights

P = torch.tensor([[1.0, 0.75, 0.0]])
ANSWER = torch.tensor([[0.25, 0.25, 0.25]])


def call(spec, *, log_ratio=0.0, batch_risk=0.5, answer=ANSWER):
    batch = Batch(
        answer_p_safe_BT=answer,
        position_BT=torch.tensor([[1, 2, 6]]),
        log_ratio_BT=torch.full((1, 3), log_ratio),
        batch_risk=batch_risk,
    )
    weights = resolve_policy(spec)(P, batch)
    return weights.ce_BT[0].tolist(), weights.kl_BT[0].tolist()


@pytest.mark.parametrize(
    ("spec", "ce", "kl"),
    [
        ("sft", [1, 1, 1], [0, 0, 0]),
        ("fixed_kl", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ({"name": "fixed_kl", "beta": 0.2}, [0.8, 0.8, 0.8], [0.2, 0.2, 0.2]),
        ("rejection", [0, 0, 0], [0, 0, 0]),
        ({"name": "rejection", "threshold": 0.25}, [1, 1, 1], [0, 0, 0]),
        ("soft_weight", [0.25, 0.25, 0.25], [0, 0, 0]),
        ("star", [1, 0.75, 0], [0, 0.125, 0.5]),
        ({"name": "star", "kl": 2.0}, [1, 0.75, 0], [0, 0.5, 2.0]),
        ("star_weight", [1, 0.75, 0], [0, 0, 0]),
        # risk 0.75: beta = 0.1 + 0.8 * 0.75 = 0.7
        ("adaptive", [0.3, 0.3, 0.3], [0.7, 0.7, 0.7]),
        # batch risk 0.5: beta = 0.1 + 0.8 * 0.5 = 0.5
        ({"name": "adaptive", "scope": "batch"}, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ({"name": "adaptive", "beta_min": 0.0, "beta_max": 1.0}, [0.25] * 3, [0.75] * 3),
        # judge scale r = 1 + 4 * 0.75 = 4: clip((4 - 2) / 3) = 2/3
        ({"name": "adaptive", "ramp": "clamp"}, [1 / 3] * 3, [2 / 3] * 3),
        # the same ce without the divergence, on every knob of adaptive
        ("adaptive_weight", [0.3] * 3, [0] * 3),
        ({"name": "adaptive_weight", "scope": "batch"}, [0.5] * 3, [0] * 3),
        ({"name": "adaptive_weight", "beta_min": 0.0, "beta_max": 1.0}, [0.25] * 3, [0] * 3),
        ({"name": "adaptive_weight", "ramp": "clamp"}, [1 / 3] * 3, [0] * 3),
        ("constrained", [1, 1, 1], [0, 0, 0]),
    ],
)
def test_weights(spec, ce, kl):
    got_ce, got_kl = call(spec)
    assert got_ce == pytest.approx(ce, abs=1e-6)
    assert got_kl == pytest.approx(kl, abs=1e-6)


def test_the_judge_scale_ramp_gives_the_released_codes_weights():
    for score, weight in ((1, 0.1), (2, 0.1), (3, 1 / 3), (4, 2 / 3), (5, 0.9)):
        spec = {"name": "adaptive", "scope": "batch", "ramp": "clamp"}
        assert call(spec, batch_risk=(score - 1) / 4)[1][0] == pytest.approx(weight, abs=1e-6)
        answer = torch.full((1, 3), 1 - (score - 1) / 4)  # as `Judge.score_many` writes a verdict into the data
        spec = {"name": "adaptive", "scope": "example", "ramp": "clamp"}
        assert call(spec, answer=answer)[1] == pytest.approx([weight] * 3, abs=1e-6)
        assert call(spec, answer=answer)[0] == pytest.approx([1 - weight] * 3, abs=1e-6)


def test_constrained_uses_its_three_rates():
    ce, _ = call({"name": "constrained", "beta_1": 0.5, "beta_2_5": 2.0, "beta_rest": 0.1}, log_ratio=1.0)
    expected = [2 * (1 - 1 / (1 + math.exp(-b))) for b in (0.5, 2.0, 0.1)]
    assert ce == pytest.approx(expected, abs=1e-6)


def test_constrained_has_the_gradient_of_its_papers_loss():
    # L = -(2 / b) * log sigmoid(b * (log pi_theta - log pi_ref)); dL/dlogp = -2 * (1 - sigmoid(b * ratio))
    ratio = torch.tensor(0.7, requires_grad=True)
    (-(2 / 0.5) * torch.nn.functional.logsigmoid(0.5 * ratio)).backward()
    assert call("constrained", log_ratio=0.7)[0][0] == pytest.approx(-ratio.grad.item(), abs=1e-6)


def test_divergence_defaults_and_override():
    assert resolve_policy("star").divergence == "reverse"
    assert resolve_policy("adaptive").divergence == "forward"
    assert resolve_policy({"name": "star", "divergence": "k2"}).divergence == "k2"


def mine(p_safe_BT, *, batch, power=2.0):
    return Weights(ce_BT=p_safe_BT**power, kl_BT=0 * p_safe_BT)


def test_a_users_own_function():
    assert call(mine)[0] == pytest.approx([1, 0.5625, 0])
    assert call({"name": f"{__name__}:mine", "power": 1.0})[0] == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": 5}, "a policy's name must be a string or a function, got 5"),
        ("starr", "unknown policy 'starr'; known: sft"),
        ({"name": "star", "lambda": 1}, "policy 'star' has no parameter 'lambda'; it has: kl"),
        ({"name": "star", "kl": -1}, r"kl must lie in \[0.0, inf\], got -1"),
        ({"name": "star", "kl": float("nan")}, "kl must lie in"),
        ({"name": "star", "kl": "much"}, "parameter 'kl' must be a number, got 'much'"),
        ({"name": "fixed_kl", "beta": 1.5}, "beta must lie in"),
        ({"name": "adaptive", "beta_min": 0.9, "beta_max": 0.1}, "beta_max must lie in"),
        ({"name": "adaptive", "scope": "token"}, "scope must be one of example, batch"),
        ({"name": "adaptive", "ema": 0.5}, "ema smooths the risk of successive batches"),
        ({"name": "star", "divergence": "js"}, "divergence must be one of reverse"),
        ("no.such.module:f", "cannot import policy"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_policy(spec)


def test_every_shipped_policy_resolves():
    for name in POLICIES:
        assert resolve_policy(name).name == name
