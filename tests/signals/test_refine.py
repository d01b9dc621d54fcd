"""Which ends refining scores, and what it says about the others."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshape.signals.refine import Refine, RefineReport, filled, wanted


def refine(values, settings):
    """The scored ends in the order of the rounds, for a trajectory that is known in full."""
    scored, rounds = {}, []
    while picked := wanted(scored, len(values), settings):
        assert not set(picked) & set(scored)
        rounds.append(picked)
        scored |= {index: values[index] for index in picked}
    return scored, rounds


def test_only_the_interval_that_moves_is_halved():
    values = [1.0] * 6 + [0.0] * 7
    scored, rounds = refine(values, Refine(stride=4, tolerance=0.05))
    assert rounds == [[0, 4, 8, 12], [6], [5]]
    assert filled(scored, 13) == values


def test_a_flat_trajectory_is_scored_at_its_stride_and_ends():
    assert refine([0.5] * 10, Refine(stride=4))[1] == [[0, 4, 8, 9]]
    assert refine([0.5], Refine())[1] == [[0]]
    assert refine([0.2, 0.9], Refine(stride=8))[1] == [[0, 1]]


def test_unscored_ends_take_the_lower_neighbour():
    scored = {0: 0.9, 3: 0.86, 4: 0.2}
    assert filled(scored, 5) == [0.9, 0.86, 0.86, 0.86, 0.2]


def test_the_tolerance_and_the_stride_change_what_is_scored():
    values = [1 - 0.02 * index for index in range(21)]
    count = {t: len(refine(values, Refine(stride=5, tolerance=t))[0]) for t in (0.0, 0.05, 0.5)}
    assert count == {0.0: 21, 0.05: 5 + 4 * 2, 0.5: 5}
    assert len(refine(values, Refine(stride=20, tolerance=1.0))[0]) == 2


def test_without_settings_everything_is_scored_at_once():
    assert refine([0.1, 0.2, 0.3], None)[1] == [[0, 1, 2]]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.integers(1, 9), st.floats(0, 1))
def test_scored_ends_are_exact_and_others_lie_within_the_tolerance_of_both(values, stride, tolerance):
    scored, _ = refine(values, Refine(stride=stride, tolerance=tolerance))
    got, known = filled(scored, len(values)), sorted(scored)
    assert known[0] == 0
    assert known[-1] == len(values) - 1
    assert all(got[index] == values[index] for index in known)
    for left, right in pairwise(known):
        for index in range(left + 1, right):
            assert got[index] == min(values[left], values[right])
            assert max(values[left], values[right]) - got[index] <= tolerance
    assert all(b - a <= stride for a, b in pairwise(known))


def test_the_report_counts_and_keeps_the_worst():
    report = RefineReport()
    report.add({0: 0.5, 3: 0.5}, 4)
    assert (report.rows, report.ends, report.scored, report.saved) == (1, 4, 2, 2)
    assert report.largest_deviation is None
    report.check([0.5, 0.5, 0.5], [0.5, 0.9, 0.48], 0.05)
    assert report.largest_deviation == pytest.approx(0.4)
    assert report.largest_overrating == pytest.approx(0.02)
    assert (report.checked, report.checked_ends, report.beyond) == (1, 3, 1)
    report.check([0.5], [0.4], 0.05)
    assert report.largest_deviation == pytest.approx(0.4)
    assert report.largest_overrating == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [{"tolerance": -0.1}, {"tolerance": 1.5}, {"stride": 0}, {"check_every": -1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Refine(**bad)
