"""Cohen's kappa against statsmodels and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import cohens_kappa

from safeshape.stats import cohen_kappa, exact

SCALE = (1, 2, 3, 4, 5)
THEIRS = {None: None, "linear": "linear", "quadratic": "quadratic"}


def judged(seed=0, n=80):
    rng = np.random.default_rng(seed)
    first = rng.integers(1, 6, size=n)
    second = np.clip(first + rng.choice([-1, 0, 0, 0, 1, 2], size=n), 1, 5)
    return first.tolist(), second.tolist()


@pytest.mark.parametrize("weights", list(THEIRS))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kappa_and_its_interval_are_those_of_statsmodels(weights, seed):
    first, second = judged(seed)
    table = np.zeros((5, 5))
    for a, b in zip(first, second, strict=True):
        table[a - 1, b - 1] += 1
    theirs = cohens_kappa(table, wt=weights)
    found = cohen_kappa(first, second, categories=SCALE, weights=weights)
    assert found.kappa == pytest.approx(theirs.kappa)
    assert (found.low, found.high) == pytest.approx((theirs.kappa_low, theirs.kappa_upp))
    assert found.kappa == pytest.approx(cohen_kappa_score(first, second, labels=SCALE, weights=weights))


def test_kappa_by_hand():
    # 20 both yes, 15 both no, 5 and 10 otherwise: agreement .7, chance .5*.6 + .5*.4 = .5, kappa .4.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert found.kappa == pytest.approx(0.4)
    assert found.agreement == pytest.approx(0.7)
    assert found.n == 50


def test_weights_and_categories_change_kappa():
    first, second = judged()
    kappas = {w: cohen_kappa(first, second, categories=SCALE, weights=w).kappa for w in THEIRS}
    assert kappas[None] < kappas["linear"] < kappas["quadratic"]  # most disagreements are of one step
    # An unused category between two used ones stretches the scale, and with quadratic weights changes nothing there
    # but the largest distance; the order of categories matters.
    turned = cohen_kappa(first, second, categories=(3, 1, 5, 2, 4), weights="quadratic").kappa
    assert turned != pytest.approx(kappas["quadratic"])


def test_the_bootstrap_interval_is_near_the_asymptotic_one_for_many_items():
    first, second = judged(n=2000)
    asymptotic = cohen_kappa(first, second)
    drawn = cohen_kappa(first, second, interval="bootstrap", resamples=400)
    assert (drawn.low, drawn.high) == pytest.approx((asymptotic.low, asymptotic.high), abs=0.01)
    assert drawn.low != asymptotic.low
    other = cohen_kappa(first, second, interval="bootstrap", resamples=400, seed=1)
    assert other.low != drawn.low


@pytest.mark.parametrize("interval", ["asymptotic", "bootstrap"])
def test_full_agreement_still_has_an_interval(interval):
    verdicts = ["safe"] * 10 + ["unsafe"] * 10
    found = cohen_kappa(verdicts, verdicts, interval=interval, resamples=50)
    assert (found.kappa, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx((exact(20, 20)[0] - 0.5) / 0.5)


@given(st.lists(st.tuples(st.sampled_from(SCALE), st.sampled_from(SCALE)), min_size=2, max_size=30))
def test_kappa_is_symmetric_and_at_most_one(pairs):
    first, second = zip(*pairs, strict=True)
    if len({*first, *second}) == 1:
        with pytest.raises(ValueError, match="every verdict is the same"):
            cohen_kappa(first, second)
        return
    found = cohen_kappa(first, second)
    assert found.kappa == pytest.approx(cohen_kappa(second, first).kappa)
    assert -1 - 1e-9 <= found.kappa <= 1 + 1e-9
    assert found.low <= found.kappa + 1e-9
    assert found.high >= found.kappa - 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cohen_kappa([1], [1]), "at least two items"),
        (lambda: cohen_kappa([1, 2], [1]), "got 2 and 1"),
        (lambda: cohen_kappa([1, 6], [1, 2], categories=SCALE), "verdict 6 is not one of"),
        (lambda: cohen_kappa([1, 2], [1, 2], weights="cubic"), "linear or quadratic"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
