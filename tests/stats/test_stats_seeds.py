"""Seeds as clusters: against closed forms, and how often each interval covers the truth with few seeds."""

import numpy as np
import pytest
from scipy.stats import t

from safeshape.stats import across_seeds, cluster_bootstrap, t_interval, wilson
from safeshape.stats.seeds import BOOTSTRAP_FROM


def test_the_t_interval_by_hand():
    # Means 1, 2, 3: standard error sqrt(1/3), and t of two degrees of freedom is 4.302653.
    low, high = t_interval([1, 2, 3])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    theirs = t.interval(0.95, 4, loc=0.5, scale=np.std([0.1, 0.4, 0.5, 0.7, 0.8], ddof=1) / 5**0.5)
    assert t_interval([0.1, 0.4, 0.5, 0.7, 0.8]) == pytest.approx(theirs)


def test_the_cluster_bootstrap_draws_whole_seeds():
    # Within a seed everything is equal, so prompts drawn one by one would give a far narrower interval than seeds do.
    groups = [[0.0] * 100, [1.0] * 100]
    assert cluster_bootstrap(groups) == (0.0, 1.0)
    means = np.random.default_rng(0).normal(size=200)
    low, high = cluster_bootstrap([[m - 1, m + 1] for m in means], resamples=4000)
    half = 1.96 * means.std() / 200**0.5
    assert (low, high) == pytest.approx((means.mean() - half, means.mean() + half), abs=0.02)
    # Sizes weigh: seeds with one 0 and as many with three 1 give 3/4, not 1/2.
    low, high = cluster_bootstrap([[0.0], [1.0] * 3] * 100, resamples=400)
    assert 0.65 < low < 0.75 < high < 0.85
    uneven = [[m] for m in means[:20]]
    assert cluster_bootstrap(uneven, seed=1) == cluster_bootstrap(uneven, seed=1)
    assert cluster_bootstrap(uneven, seed=1) != cluster_bootstrap(uneven, seed=2)


def test_with_three_seeds_t_covers_the_truth_and_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    covered = {"t": 0, "bootstrap": 0}
    rounds = 300
    for _ in range(rounds):
        means = rng.normal(0.5, 0.1, size=3)
        for name, (low, high) in {
            "t": t_interval(means),
            "bootstrap": cluster_bootstrap([[m] for m in means], resamples=100),
        }.items():
            covered[name] += low <= 0.5 <= high
    assert covered["t"] / rounds > 0.92
    assert 0.6 < covered["bootstrap"] / rounds < 0.85


def test_how_many_seeds_decide_the_method():
    one = across_seeds([0.3], [50])
    assert (one.low, one.high) == pytest.approx(wilson(15, 50))
    assert one.method.startswith("Wilson")
    three = across_seeds([0.2, 0.5, 0.8], [50, 50, 50])
    assert three.method.startswith("t over 3 seeds")
    assert (three.low, three.high) == (0.0, 1.0)  # the t interval is wider than [0, 1] here, and cut to it
    rates = [0.3, 0.5] * (BOOTSTRAP_FROM // 2)
    many = across_seeds(rates, [10_000] * len(rates))
    assert many.method.startswith(f"bootstrap of {BOOTSTRAP_FROM} seeds")
    assert 0.3 < many.low < 0.4 < many.high < 0.5
    assert many.value == pytest.approx(0.4)
    assert across_seeds(rates, [10_000] * len(rates), seed=3) == across_seeds(rates, [10_000] * len(rates), seed=3)


def test_seeds_that_agree_leave_the_interval_of_their_prompts():
    never = across_seeds([0.0, 0.0, 0.0], [150, 150, 150])
    assert (never.low, never.high) == pytest.approx(wilson(0, 150))
    assert never.high > 0.02
    assert across_seeds([0.0, 0.0, 0.0], [150, 150, 20]).high == pytest.approx(wilson(0, 20)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([1.0]), "at least two"),
        (lambda: cluster_bootstrap([[1.0]]), "at least two"),
        (lambda: cluster_bootstrap([[1.0], []]), "a seed has no observations"),
        (lambda: across_seeds([], []), "every seed needs a rate"),
        (lambda: across_seeds([0.5], [10, 10]), "every seed needs a rate"),
        (lambda: across_seeds([1.5, 1.5], [10, 10]), r"a rate must lie in \[0, 1\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
