"""Bootstrap intervals: numbers that can be checked by hand, and how often they cover the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from safeshape.stats import bootstrap, bounded_mean, exact, mean_band, wilson, wilson_of_rate


def test_a_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_rows():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    low, high = bootstrap(lambda drawn: float(drawn.mean()), values, resamples=4000)
    half = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


def test_the_basic_interval_mirrors_the_percentile_one_at_the_estimate():
    values = np.random.default_rng(1).exponential(size=40)

    def mean(drawn):
        return float(drawn.mean())

    low, high = bootstrap(mean, values, seed=3)
    basic_low, basic_high = bootstrap(mean, values, method="basic", seed=3)
    assert (basic_low, basic_high) == pytest.approx((2 * values.mean() - high, 2 * values.mean() - low))


def test_groups_are_resampled_within_themselves():
    # The first group is constant, so all spread comes from the second: 1 + mean of {0, 1} drawn twice.
    low, high = bootstrap(lambda a, b: float(a.mean() + b.mean()), np.ones(50), np.array([0.0, 1.0]))
    assert (low, high) == (1.0, 2.0)


def test_the_seed_repeats_an_interval_and_changes_it():
    values = np.random.default_rng(1).normal(size=30)
    first, again, other = (bootstrap(np.mean, values, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_band_is_the_interval_of_every_column_and_keeps_rows_together():
    values_RP = np.random.default_rng(0).normal(size=(400, 1)) * np.array([1.0, 2.0, 0.0]) + np.array([0.0, 1.0, 5.0])
    low_P, high_P = mean_band(values_RP, resamples=4000)
    half_P = 1.96 * values_RP.std(axis=0) / 400**0.5
    np.testing.assert_allclose(low_P, values_RP.mean(axis=0) - half_P, atol=0.01)
    np.testing.assert_allclose(high_P, values_RP.mean(axis=0) + half_P, atol=0.02)
    np.testing.assert_allclose(low_P[1] - 1, 2 * low_P[0])  # column 1 is 1 + 2 * column 0, row by row


def test_equal_values_leave_room_for_what_was_not_seen():
    values = np.random.default_rng(0).integers(1, 6, size=40).astype(float)
    assert bounded_mean(values, least=1, most=5, seed=2) == bootstrap(np.mean, values, seed=2)
    # 6 of 6 were 1: at most 1 - 0.025^(1/6) = 45.9 % are others, and no more than 4 higher.
    low, high = bounded_mean(np.ones(6), least=1, most=5)
    assert (low, high) == pytest.approx((1.0, 1 + 4 * (1 - 0.025 ** (1 / 6))))
    low, high = bounded_mean(np.full(6, 4.0), least=1, most=5)
    assert (low, high) == pytest.approx((4 - 3 * (1 - 0.025 ** (1 / 6)), 4 + (1 - 0.025 ** (1 / 6))))
    with pytest.raises(ValueError, match=r"values must lie in \[1, 5\], got 0.0 to 2.0"):
        bounded_mean(np.array([0.0, 2.0]), least=1, most=5)


@pytest.mark.parametrize("rows", [0, 1])
def test_one_observation_has_no_interval(rows):
    with pytest.raises(ValueError, match="at least two"):
        bootstrap(np.mean, np.ones(5), np.ones(rows))
    with pytest.raises(ValueError, match="at least two rows"):
        mean_band(np.ones((rows, 3)))


@given(st.integers(1, 400), st.floats(0, 1))
def test_rates_are_those_of_statsmodels(n, share):
    successes = round(n * share)
    theirs = {m: proportion_confint(successes, n, method=m) for m in ("wilson", "beta")}
    assert wilson(successes, n) == pytest.approx(theirs["wilson"], abs=1e-9)
    assert wilson_of_rate(successes / n, n) == pytest.approx(theirs["wilson"], abs=1e-9)
    assert exact(successes, n) == pytest.approx(theirs["beta"], abs=1e-7)
    assert exact(successes, n)[0] <= successes / n <= exact(successes, n)[1]


def test_rounding_never_puts_a_rate_outside_its_interval():
    for n in range(1, 400):
        for rate in (0.0, 1.0):
            for low, high in (wilson_of_rate(rate, n), wilson(round(rate * n), n), exact(round(rate * n), n)):
                assert low <= rate <= high


def test_no_success_in_n_has_a_closed_form():
    # The exact upper end solves (1 - p)^n = 0.025; the "rule of three" for 95 % on both sides.
    assert exact(0, 150) == pytest.approx((0.0, 1 - 0.025 ** (1 / 150)))
    assert exact(150, 150) == pytest.approx((0.025 ** (1 / 150), 1.0))


@pytest.mark.parametrize("call", [lambda: exact(1, 0), lambda: exact(6, 5), lambda: wilson_of_rate(1.1, 5)])
def test_what_is_not_a_rate_is_refused(call):
    with pytest.raises(ValueError, match="a rate"):
        call()
