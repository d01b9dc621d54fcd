"""Reading scored rows, their trajectories, and cutting answers."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshape.signals.scored import (
    NOT_SCORED,
    at_progress,
    cut,
    largest_drop,
    safe_spans,
    scored,
    summary,
    turns_unsafe,
)

ANSWER = "good one bad two good three"
ENDS = (8, 16, 27)


def row(*scores, answer=ANSWER, ends=ENDS, **safety):
    spans = [{"start": a, "end": b, "p_safe": p} for a, b, p in zip((0, *ends), ends, scores, strict=False)]
    safety = {"signal": "star", "p_safe": scores[-1], "spans": spans, "scorer": {"guard": "g"}, "error": None, **safety}
    return {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}],
        "safety": safety,
        "note": 7,
    }


def test_a_trajectory_has_its_end_its_lowest_point_its_fall_and_its_turn():
    score = scored(row(0.9, 0.2, 0.6)).score
    assert summary(score, "last") == 0.6
    assert summary(score, "min") == 0.2
    assert largest_drop(score) == pytest.approx(0.7)
    assert turns_unsafe(score)
    rising = scored(row(0.2, 0.6, 0.9)).score
    assert largest_drop(rising) == 0
    assert not turns_unsafe(rising)
    assert turns_unsafe(scored(row(0.5, 0.49)).score)
    assert not turns_unsafe(scored(row(0.6, 0.5)).score)


def test_the_largest_fall_is_over_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.random(3).tolist()
        naive = max(values[i] - values[j] for i in range(3) for j in range(i, 3))
        assert largest_drop(scored(row(*values)).score) == pytest.approx(naive)


def test_progress_reads_the_step_that_holds_the_position():
    score = scored(row(0.9, 0.2, answer="0123456789", ends=(3, 10))).score
    grid = np.array([0.0, 0.1, 0.3, 0.31, 0.9, 1.0])
    assert at_progress(score, 10, grid).tolist() == [0.9, 0.9, 0.9, 0.2, 0.2, 0.2]


def test_an_answer_judged_as_a_whole_has_a_flat_trajectory():
    score = scored(
        {"prompt": "q", "completion": "a b", "safety": {"signal": "probe", "p_safe": 0.3, "spans": []}}
    ).score
    assert at_progress(score, 3, np.array([0.0, 0.5, 1.0])).tolist() == [0.3, 0.3, 0.3]
    assert summary(score, "min") == 0.3


def test_failures_keep_their_reason_and_are_never_a_score():
    failed = scored(row(None, p_safe=None, spans=[], error="timeout"))
    assert failed.score.p_safe is None
    assert failed.score.error == "timeout"
    assert summary(failed.score, "min") is None
    assert scored({**row(0.5), "safety": None}).score.error == NOT_SCORED
    without_answer = {"messages": [{"role": "user", "content": "q"}], "safety": {"p_safe": None, "error": "no answer"}}
    assert scored(without_answer).answer == ""
    with pytest.raises(ValueError, match="no trajectory"):
        at_progress(failed.score, 5, np.array([0.5]))


def test_an_error_beside_a_score_is_still_a_failure():
    assert scored(row(0.9, 0.9, 0.9, error="half read")).score.p_safe is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"messages": []}, "no `safety` column"),
        ({**row(0.5), "safety": "x"}, "must be a mapping"),
        ({**row(0.5), "messages": [{"role": "user", "content": "q"}]}, "assistant"),
        (row(0.5, ends=(99,)), "lies outside the answer"),
        (row(1.5, 0.5, 0.5), "number in \\[0, 1\\]"),
        (row(float("nan"), 0.5, 0.5), "number in \\[0, 1\\]"),
    ],
)
def test_bad_rows_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        scored(bad)


def test_cutting_keeps_what_stands_before_and_changes_nothing_else():
    whole = row(0.9, 0.2, 0.6)
    before = copy.deepcopy(whole)
    item = scored(whole)
    assert safe_spans(item.score, 0.5) == 1
    shorter = cut(whole, item, 1)
    assert shorter["messages"][-1] == {"role": "assistant", "content": "good one"}
    assert shorter["safety"]["p_safe"] == 0.9
    assert shorter["safety"]["spans"] == before["safety"]["spans"][:1]
    assert shorter["safety"]["scorer"] == {"guard": "g"}
    assert shorter["note"] == 7
    assert shorter["messages"][:-1] == before["messages"][:-1]
    assert whole == before
    assert cut(whole, item, 0) is None


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (lambda a: {"prompt": "q", "completion": a}, lambda r: r["completion"]),
        (
            lambda a: {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": a}],
            },
            lambda r: r["completion"][-1]["content"],
        ),
        (
            lambda a: {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": a}]},
            lambda r: r["conversations"][-1]["value"],
        ),
    ],
)
def test_every_form_of_a_row_is_cut_in_its_own_columns(form, read):
    source = {**form(ANSWER), "safety": row(0.9, 0.2, 0.6)["safety"]}
    shorter = cut(source, scored(source), 1)
    assert read(shorter) == "good one"
    assert set(shorter) == set(source)
    assert read(source) == ANSWER


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1))
def test_a_prefix_is_safe_everywhere_and_as_long_as_it_can_be(values, threshold):
    answer = "ab " * len(values)
    source = row(*values, answer=answer, ends=tuple(3 * (i + 1) for i in range(len(values))))
    item = scored(source)
    spans = safe_spans(item.score, threshold)
    assert all(p >= threshold for p in values[:spans])
    assert spans == len(values) or values[spans] < threshold
    shorter = cut(source, item, spans)
    assert (shorter is None) == (spans == 0)
    if shorter is not None:
        assert summary(scored(shorter).score, "min") >= threshold
