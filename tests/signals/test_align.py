"""Spans over characters reach the right tokens, whatever the tokenizer and the script."""

import itertools

import numpy as np
import pytest
from conftest import TOKENIZERS, conversation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeshape.signals.align import character_scores, training_row
from safeshape.types import Span

KITS = {name: make() for name, make in TOKENIZERS.items()}
SAMPLES = [
    "the quick brown fox jumps over",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d",
    "emoji \U0001f642\U0001f1e9\U0001f1ea and \U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd and \u0645\u0631\u062d\u0628\u0627",
    "tabs\tand\n\nnewlines   and spaces ",
    "fox jumps <tool> over e\u0301 combining \ufb01 ligature \u4f60\u597d",
]


def spans_at(answer: str, cuts: list[int], scores: list[float]) -> list[Span]:
    edges = sorted({0, len(answer), *cuts})
    return [Span(start=a, end=b, p_safe=scores[i % len(scores)]) for i, (a, b) in enumerate(itertools.pairwise(edges))]


def learned(answer: str, spans: list[Span], tokenizer):
    safety = {"p_safe": 1.0, "spans": [{"start": s.start, "end": s.end, "p_safe": s.p_safe} for s in spans]}
    row = {"messages": conversation("one two", answer), "safety": safety}
    return training_row(row, tokenizer, needs_signal=True, max_length=None, overlong="refuse")


def check(answer: str, spans: list[Span], tokenizer) -> None:
    row = learned(answer, spans, tokenizer)
    text = tokenizer.apply_chat_template(conversation("one two", answer), tokenize=False)
    head = tokenizer.apply_chat_template(
        conversation("one two", answer)[:1], tokenize=False, add_generation_prompt=True
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    per_character = {i: s.p_safe for s in spans for i in range(s.start, s.end)}
    for (start, end), label, score in zip(encoded["offset_mapping"], row["labels"], row["p_safe"], strict=True):
        if start < len(head) or end == start:
            assert label == -100
            continue
        touched = [per_character[i] for i in range(start - len(head), end - len(head)) if i in per_character]
        assert score == pytest.approx(min(touched, default=spans[-1].p_safe)), (start, end)


@pytest.mark.parametrize("answer", SAMPLES)
@pytest.mark.parametrize("name", sorted(KITS))
def test_a_token_has_the_lowest_score_of_its_characters(name, answer):
    cut = len(answer) // 2
    check(answer, spans_at(answer, [3, cut], [0.9, 0.1, 0.6]), KITS[name])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(KITS)),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip),
    st.lists(st.integers(1, 39), max_size=4),
)
def test_any_unicode_any_cuts(name, answer, cuts):
    check(answer, spans_at(answer, [c for c in cuts if c < len(answer)], [1.0, 0.0, 0.5]), KITS[name])


def test_the_end_marker_belongs_to_the_last_span(tokenizer):
    row = learned("one two", spans_at("one two", [3], [1.0, 0.125]), tokenizer)
    assert row["p_safe"][-1] == row["p_safe"][-2] == 0.125


def test_blanks_between_spans_go_to_the_next_and_gaps_take_the_whole_answers_score():
    spans = [Span(start=0, end=3, p_safe=0.9), Span(start=4, end=7, p_safe=0.1)]
    assert character_scores("one two six", spans, 0.5).tolist() == pytest.approx([0.9] * 3 + [0.1] * 4 + [0.5] * 5)


def test_without_spans_every_character_has_the_answers_score():
    assert np.all(character_scores("abc", [], 0.25) == 0.25)


def test_the_last_spans_score_stands_for_the_answer_where_none_is_given(tokenizer):
    safety = {"spans": [{"start": 0, "end": 3, "p_safe": 0.5}, {"start": 3, "end": 7, "p_safe": 0.25}]}
    row = {"messages": conversation("one", "one two"), "safety": safety}
    got = training_row(row, tokenizer, needs_signal=True, max_length=None, overlong="refuse")
    assert got["answer_p_safe"][-1] == 0.25
