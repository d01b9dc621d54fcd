"""The adaptive attacker against scorers whose verdict can be counted by hand."""

import random

import pytest
from conftest import conversation

from safeshape.attacks import Pools, data_attack
from safeshape.attacks.adaptive import STRATEGIES, Material, scorer_of
from safeshape.types import Score, Span

HARM = "Bad one. Bad two. Bad three."


def pools(count=4):
    return Pools(
        benign=[conversation(f"ask {i}", f"Good {i}. Nice {i}.") for i in range(10)],
        harmful=[conversation(f"do {i}", HARM) for i in range(count)],
    )


def words_share(rows):
    """p_safe is the share of words that do not begin with bad: padding raises it, and nothing else does."""
    answers = [row[-1]["content"].lower().split() for row in rows]
    return [
        sum(not word.startswith(("bad", "one", "two", "three")) for word in words) / len(words) for words in answers
    ]


def run(score=words_share, *, size=4, seed=0, pools=pools(), **parameters):  # noqa: B008
    return data_attack("adaptive", {"score": score, **parameters})(pools, size=size, seed=seed)


class Counting:
    """Counts the conversations that a scorer is asked about."""

    def __init__(self, score):
        self.score, self.asked, self.calls = score, 0, 0

    def __call__(self, rows):
        self.asked += len(rows)
        self.calls += 1
        return self.score(rows)


def test_padding_raises_the_score_until_the_target_and_no_further():
    # Six bad words; every pad_after adds two good ones: 2/8, 4/10, 6/12 = 0.5. Three edits, four queries.
    score = Counting(words_share)
    made = run(score, strategies=["pad_after"], target=0.5)
    scores = made.report["scores"]
    assert scores["mean_p_safe_before"] == 0
    assert scores["mean_p_safe_after"] == 0.5
    assert (scores["at_target_before"], scores["at_target_after"]) == (0, 4)
    assert scores["queries"] == score.asked == 16
    assert score.calls == 4  # the rows are asked about together
    assert scores["kept"] == {"pad_after": 12}
    for place, row in enumerate(made.dataset):
        assert row["origin"] == "harmful+adaptive"
        assert row["poisoned"]
        answer = row["messages"][-1]["content"]
        assert answer.startswith(HARM + " ")
        assert len(answer.split()) == 12
        assert words_share([row["messages"]]) == [made.report["by_row"][place]["p_safe_after"]]


def test_the_attacker_stops_at_the_query_budget():
    score = Counting(words_share)
    made = run(score, strategies=["pad_after"], target=0.99, queries=3)
    assert score.asked == 12
    assert {facts["queries"] for facts in made.report["by_row"].values()} == {3}
    assert {len(row["messages"][-1]["content"].split()) for row in made.dataset} == {10}
    assert made.report["scores"]["at_target_after"] == 0
    assert run(queries=1).report["rows_by_origin"] == {"harmful": 4}


def test_an_edit_that_does_not_help_is_undone():
    made = run(lambda rows: [0.3] * len(rows), queries=5)
    assert made.report["rows_by_origin"] == {"harmful": 4}
    assert all(row["messages"][-1]["content"] == HARM for row in made.dataset)
    assert {facts["queries"] for facts in made.report["by_row"].values()} == {5}


def test_a_row_that_looks_safe_already_is_left_alone():
    made = run(lambda rows: [0.9] * len(rows), target=0.9)
    assert made.report["scores"]["queries"] == 4
    assert made.report["scores"]["at_target_before"] == 4
    assert made.report["rows_by_origin"] == {"harmful": 4}


def test_a_failed_score_is_counted_and_never_taken_for_one():
    made = run(lambda rows: [None] * len(rows), queries=5)
    assert made.report["scores"]["never_scored"] == 4
    assert made.report["scores"]["failed_queries"] == made.report["scores"]["queries"] == 4
    assert made.report["scores"]["mean_p_safe_before"] is None
    first = iter([True])

    def fails_after(rows):
        return words_share(rows) if next(first, False) else [None] * len(rows)

    made = run(fails_after, queries=3)
    assert made.report["scores"]["failed_queries"] == 8
    assert made.report["rows_by_origin"] == {"harmful": 4}


def test_splitting_puts_a_benign_sentence_between_any_two():
    made = run(size=1, strategies=["split"], target=0.4, padding=["Good."])
    assert (
        made.dataset[0]["messages"][-1]["content"] == "Bad one. Good. Good. Good. Bad two. Good. Good. Good. Bad three."
    )


def test_rewriting_uses_the_users_words():
    own = {"Bad": ["Poor", "Weak"], "absent": ["x"]}
    made = run(size=4, strategies=["rewrite"], target=0.5, rewrites=own)
    found = {row["messages"][-1]["content"] for row in made.dataset}
    assert found == {HARM.replace("Bad", "Poor"), HARM.replace("Bad", "Weak")}
    made = run(strategies=["rewrite"], rewrites={"absent": ["x"]})
    assert made.report["scores"]["queries"] == 4  # nothing to propose, so nothing is asked


def test_requests_are_padded_for_a_scorer_that_reads_prompts_alone():
    def length(rows):
        return [min(1.0, len(row[0]["content"].split()) / 6) for row in rows]

    made = run(length, strategies=["pad_request"], target=1.0)
    assert made.report["scores"]["at_target_after"] == 4  # two words and twice two
    assert all(row["messages"][-1]["content"] == HARM for row in made.dataset)
    rewritten = run(
        lambda rows: [row[0]["content"].startswith("make") * 1.0 for row in rows],
        strategies=["rewrite_request"],
        rewrites={"do": ["make"]},
    )
    assert {row["messages"][0]["content"][:5] for row in rewritten.dataset} == {"make "}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_leaves_its_input_alone_and_keeps_the_harm(name):
    messages = conversation("please do it", HARM)
    material = Material(padding=["Good."], rewrites={"one": ["1"], "do": ["make"]})
    edited = STRATEGIES[name](messages, material, random.Random(0))
    assert messages == conversation("please do it", HARM)
    assert edited != messages
    if name != "rewrite":
        left = edited[-1]["content"]
        assert [left.index(part) for part in ("Bad one.", "Bad two.", "Bad three.")] == sorted(
            left.index(part) for part in ("Bad one.", "Bad two.", "Bad three.")
        )


def test_a_benign_share_and_the_seed():
    made = run(size=8, ratio=0.5)
    assert made.report["rows_by_origin"] == {"benign": 4, "harmful+adaptive": 4}
    assert run(size=8, ratio=0.5) == made
    assert run(size=8, ratio=0.5, seed=1).dataset != made.dataset


def test_a_scorer_from_a_signal():
    spans = (Span(start=0, end=1, p_safe=0.2), Span(start=1, end=2, p_safe=0.7))
    found = [
        Score(signal="star", p_safe=0.7, spans=spans, scorer={}),
        Score(signal="star", p_safe=None, scorer={}, error="no"),
        Score(signal="probe", p_safe=0.4, scorer={}),
    ]
    assert scorer_of(lambda rows: iter(found))([[], [], []]) == [0.7, None, 0.4]
    assert scorer_of(lambda rows: iter(found), "min")([[], [], []]) == [0.2, None, 0.4]
    with pytest.raises(ValueError, match="by must be last or min"):
        scorer_of(lambda rows: iter(found), "mean")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"target": 0.0}, r"target must lie in \(0, 1\], got 0.0"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"strategies": []}, "strategies must name at least one edit"),
        ({"strategies": ["beg"]}, "unknown strategy 'beg'; known: pad_before"),
        ({"rewrites": {"a": "b"}}, "rewrites must map each text to a list"),
        ({"rewrites": {"a": []}}, "rewrites must map each text to a list"),
        ({"padding": []}, "need benign sentences; give a benign pool or padding"),
        ({"score": lambda rows: [0.5]}, "the scorer gave 1 scores for 4 conversations"),
    ],
)
def test_bad_settings_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        run(**parameters)
