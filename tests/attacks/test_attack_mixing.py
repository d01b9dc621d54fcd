"""Counting and drawing: exact shares, no row twice, nothing but the seed decides."""

import pytest
from conftest import conversation
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshape.attacks import Pools, data_attack
from safeshape.attacks.mixing import Counts, counts_of, draw, draw_safe, plan


def rows(label, count):
    return [conversation(f"{label} request {i}", f"{label} answer {i}.") for i in range(count)]


def pools(benign=100, harmful=100, safe=100):
    return Pools(benign=rows("good", benign), harmful=rows("bad", harmful), safe=rows("safe", safe))


@pytest.mark.parametrize(
    ("size", "ratio", "safe_ratio", "wanted"),
    [
        (100, 0.05, 0.0, (5, 0, 95)),
        (400, 0.2, 0.0, (80, 0, 320)),
        (50, 0.07, 0.0, (4, 0, 46)),  # 3.5 as written; as floats 3.5000000000000004
        (10, 0.25, 0.0, (3, 0, 7)),  # 2.5: halves go up, Python's round would give 2
        (30, 0.05, 0.05, (2, 2, 26)),
        (5, 0.5, 0.5, (3, 2, 0)),  # the safe rows are what is left
        (7, 0.0, 0.0, (0, 0, 7)),
        (7, 1.0, 0.0, (7, 0, 0)),
        (7, 1, 0, (7, 0, 0)),
        (11, 1 / 11, 1 / 11, (1, 1, 9)),
    ],
)
def test_shares_are_rounded_halves_up(size, ratio, safe_ratio, wanted):
    assert counts_of(size, ratio, safe_ratio) == Counts(poisoned=wanted[0], safe=wanted[1], benign=wanted[2])


@pytest.mark.parametrize(
    ("size", "ratio", "safe_ratio", "message"),
    [
        (0, 0.5, 0.0, "size must be at least 1, got 0"),
        (10, 1.5, 0.0, r"^ratio must lie in \[0, 1\], got 1.5"),
        (10, -0.1, 0.0, r"^ratio must lie in \[0, 1\]"),
        (10, float("nan"), 0.0, r"^ratio must lie in \[0, 1\], got nan"),
        (10, True, 0.0, r"^ratio must lie in"),
        (10, "0.1", 0.0, r"^ratio must lie in"),
        (10, 0.5, 1.1, r"^safe_ratio must lie in \[0, 1\]"),
        (10, 0.6, 0.5, "together must be at most 1, got 0.6 and 0.5"),
        (100, 0.004, 0.0, "ratio 0.004 of 100 rows is less than half a row"),
        (100, 0.5, 0.004, "safe_ratio 0.004 of 100 rows is less than half a row"),
    ],
)
def test_bad_shares_are_refused(size, ratio, safe_ratio, message):
    with pytest.raises(ValueError, match=message):
        counts_of(size, ratio, safe_ratio)


@given(
    size=st.integers(1, 120),
    ratio=st.integers(0, 100).map(lambda n: n / 100),
    safe_ratio=st.integers(0, 100).map(lambda n: n / 100),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_mixing_keeps_its_promises(size, ratio, safe_ratio, seed):
    try:
        counts = counts_of(size, ratio, safe_ratio)
    except ValueError as error:
        assert ratio + safe_ratio > 1 or "less than half a row" in str(error)  # noqa: PT017
        return
    assert counts.poisoned + counts.safe + counts.benign == size
    assert abs(counts.poisoned - size * ratio) <= 0.5 + 1e-9
    assert min(counts.poisoned, counts.safe, counts.benign) >= 0
    made = data_attack("mixed", {"ratio": ratio, "safe_ratio": safe_ratio})(pools(130, 130, 130), size=size, seed=seed)
    origins = [row["origin"] for row in made.dataset]
    assert [origins.count(o) for o in ("harmful", "safe", "benign")] == [counts.poisoned, counts.safe, counts.benign]
    assert [row["poisoned"] for row in made.dataset] == [origin == "harmful" for origin in origins]
    texts = [row["messages"][0]["content"] for row in made.dataset]
    assert len(set(texts)) == size
    for pool, pairs in made.report["drawn"].items():
        label = {"benign": "good", "harmful": "bad", "safe": "safe"}[pool]
        assert all(texts[place] == f"{label} request {index}" for place, index in pairs)


def test_without_a_size_it_is_the_largest_that_the_pools_allow():
    # 5 % of 105 is 5.25, so 5 and 100 benign; of 106 it is 5.3 and 101 benign rows would be needed.
    assert plan(pools(100, 100), None, ratio=0.05) == Counts(poisoned=5, safe=0, benign=100)
    # 4 harmful rows: 5 % of 89 is 4.45, so 4; of 90 it is 4.5, so 5.
    assert plan(pools(100, 4), None, ratio=0.05) == Counts(poisoned=4, safe=0, benign=85)
    assert plan(pools(0, 30, 7), None, ratio=0.5, safe_ratio=0.5) == Counts(poisoned=8, safe=7, benign=0)
    assert plan(pools(100, 3), None, ratio=1.0) == Counts(poisoned=3, safe=0, benign=0)
    # 14.4 of 72 are 14, which use up 42 benign rows beside the 58; of 73 it is 14.6, so 15, and 103 would be needed.
    assert plan(pools(100, 50), None, ratio=0.2, carriers=3) == Counts(poisoned=14, safe=0, benign=58)


@pytest.mark.parametrize(
    ("given_pools", "size", "ratio", "message"),
    [
        (pools(harmful=0), 10, 0.5, "needs harmful rows; give a harmful pool"),
        (pools(benign=0), 10, 0.5, "needs benign rows; give a benign pool"),
        (pools(harmful=0), None, 0.5, "needs harmful rows"),
        (pools(harmful=4), 10, 0.5, "5 harmful rows are needed, but the pool has only 4 different ones"),
        (pools(benign=4), 10, 0.5, "5 benign rows are needed, but the pool has only 4 different ones"),
        (pools(benign=3, harmful=3), None, 0.05, "ratio 0.05 of 1 rows is less than half a row"),
    ],
)
def test_pools_that_are_missing_or_too_small_are_named(given_pools, size, ratio, message):
    with pytest.raises(ValueError, match=message):
        plan(given_pools, size, ratio=ratio)


def test_a_row_that_stands_twice_in_a_pool_counts_once():
    twice = Pools(harmful=rows("bad", 3) * 2)
    assert len(draw(twice, "harmful", 3, seed=0)) == 3
    with pytest.raises(ValueError, match="4 harmful rows are needed, but the pool has only 3 different ones"):
        draw(twice, "harmful", 4, seed=0)


def test_a_larger_draw_begins_with_a_smaller_one_and_the_seed_decides():
    few, many = draw(pools(), "harmful", 5, seed=1), draw(pools(), "harmful", 50, seed=1)
    assert many[:5] == few
    assert draw(pools(), "harmful", 50, seed=1) == many
    assert draw(pools(), "harmful", 50, seed=2) != many


def test_safe_rows_go_with_the_harmful_requests_or_avoid_them():
    harmful = rows("bad", 10)
    refused = [conversation(f"bad request {i}", "no.") for i in range(10)] + rows("safe", 10)
    both = Pools(harmful=harmful, safe=refused)
    drawn = draw(both, "harmful", 4, seed=0)
    asked = {source.messages[0]["content"] for source in drawn}
    with_them = draw_safe(both, 6, drawn, seed=0, paired=True)
    assert [source.messages[0]["content"] in asked for source in with_them] == [True] * 4 + [False] * 2
    without = draw_safe(both, 18, drawn, seed=0, paired=False)
    assert [source.messages[0]["content"] in asked for source in without] == [False] * 16 + [True] * 2
