"""Paired and unpaired comparisons and Holm's correction, against statsmodels and numbers done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

from safeshape.stats import holm, mcnemar, paired_bootstrap, paired_comparison, two_proportions, unpaired_comparison
from safeshape.stats.comparisons import newcombe

COUNTS = st.tuples(*[st.integers(0, 12)] * 4).filter(lambda counts: sum(counts) > 1)


def lists(both, first_only, second_only, neither):
    """Outcomes of two models with the given numbers of prompts in each cell."""
    first = [1] * (both + first_only) + [0] * (second_only + neither)
    second = [1] * both + [0] * first_only + [1] * second_only + [0] * neither
    return first, second


@given(COUNTS)
def test_mcnemar_is_that_of_statsmodels(counts):
    first, second = lists(*counts)
    both, only_first, only_second, neither = counts
    table = [[both, only_first], [only_second, neither]]
    assert mcnemar(first, second) == (
        only_first,
        only_second,
        pytest.approx(their_mcnemar(table, exact=True).pvalue if only_first + only_second else 1.0),
    )
    if only_first + only_second:
        theirs = their_mcnemar(table, exact=False, correction=False).pvalue
        assert mcnemar(first, second, method="chi2")[2] == pytest.approx(theirs)


def test_mcnemar_by_hand():
    # Two disagreements, both one way: exact 2 * (1/2)^2; mid-p takes half of what was seen off each side.
    first, second = lists(3, 2, 0, 5)
    assert mcnemar(first, second)[2] == pytest.approx(0.5)
    assert mcnemar(first, second, method="midp")[2] == pytest.approx(0.25)
    assert mcnemar(first, second, method="chi2")[2] == pytest.approx(2 * norm.sf(2**0.5))
    # One each way: nothing speaks for a difference.
    assert mcnemar(*lists(0, 1, 1, 0), method="midp")[2] == pytest.approx(1)


@given(COUNTS)
def test_mcnemar_does_not_depend_on_which_model_is_first_and_mid_p_is_the_smaller(counts):
    first, second = lists(*counts)
    for method in ("exact", "midp", "chi2"):
        one, two, p = mcnemar(first, second, method=method)
        assert mcnemar(second, first, method=method) == (two, one, pytest.approx(p))
    assert mcnemar(first, second, method="midp")[2] <= mcnemar(first, second)[2]


def test_the_paired_bootstrap_keeps_pairs_together():
    # The second model is the first plus 0.25 everywhere: however prompts are drawn, the difference is 0.25.
    first = np.random.default_rng(0).normal(size=50)
    assert paired_bootstrap(first, first + 0.25) == pytest.approx((0.25, 0.25))
    first, second = lists(100, 40, 100, 160)
    low, high = paired_bootstrap(first, second, resamples=4000)
    half = 1.96 * np.std(np.subtract(second, first)) / 400**0.5
    assert (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=0.01)
    assert paired_bootstrap(first, second, seed=1) != paired_bootstrap(first, second, seed=2)


def test_a_paired_comparison_holds_everything_and_never_an_interval_without_width():
    found = paired_comparison(*lists(10, 1, 9, 80))
    assert found.difference == pytest.approx(0.08)
    assert (found.only_first, found.only_second, found.n) == (1, 9, 100)
    assert found.p_value == pytest.approx(22 / 1024)  # 2 * (1 + 10) / 2^10
    assert 0 < found.low < 0.08 < found.high
    same = paired_comparison([0] * 20, [0] * 20)
    assert (same.p_value, same.difference) == (1.0, 0.0)
    assert (same.low, same.high) == pytest.approx(newcombe(0, 20, 0, 20))
    assert same.high > 0.1
    midp = paired_comparison(*lists(10, 1, 9, 80), method="midp")
    assert midp.p_value < found.p_value
    assert "midp" in midp.test


@given(st.integers(0, 30), st.integers(0, 30))
def test_newcombe_is_that_of_statsmodels(one, two):
    low, high = newcombe(one / 30, 30, two / 40, 40)
    assert (low, high) == pytest.approx(confint_proportions_2indep(two, 40, one, 30, method="newcomb"), abs=1e-9)


def test_two_proportions_by_hand():
    # Fisher: of the tables with the same margins, 3 of 3 against 0 of 3 is one of 20, and so is its mirror image.
    assert two_proportions(3, 3, 0, 3) == pytest.approx(0.1)
    found = unpaired_comparison(3, 3, 0, 3)
    assert found.difference == -1
    assert found.p_value == pytest.approx(0.1)
    assert found.only_first is None
    assert two_proportions(5, 10, 5, 10) == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_holm_is_that_of_statsmodels(n):
    p_values = np.random.default_rng(n).beta(0.5, 3, size=n).round(2).tolist()  # with ties
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferronis(p_values):
    adjusted = holm(p_values)
    for before, after in zip(p_values, adjusted, strict=True):
        assert before <= after <= min(1.0, len(p_values) * max(p_values))
    ranked = sorted(zip(p_values, adjusted, strict=True))
    assert [after for _, after in ranked] == sorted(adjusted)
    assert adjusted[p_values.index(min(p_values))] == pytest.approx(min(1.0, len(p_values) * min(p_values)))


def test_holm_by_hand():
    # Sorted .01, .03, .04: three times the first; twice the second; the third may not fall below the second.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mcnemar([1, 0], [1]), "two lists of one length"),
        (lambda: mcnemar([1, 2], [1, 0]), "outcomes that are 0 or 1"),
        (lambda: mcnemar([1, 0], [1, 0], method="yates"), "method must be exact, midp or chi2"),
        (lambda: paired_bootstrap([1, float("nan")], [1, 0]), "without a verdict"),
        (lambda: paired_bootstrap([1], [0]), "at least two"),
        (lambda: two_proportions(1, 0, 1, 2), "n >= 1"),
        (lambda: holm([0.5, 1.5]), "a p-value must lie in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
