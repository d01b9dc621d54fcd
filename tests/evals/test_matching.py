"""Answers against references: exact numbers and not substrings, letters, SQL, instructions; beginnings of refusals."""

from decimal import Decimal

import nltk
import pytest

from safeshape.evals.matching import (
    choice_letter,
    chosen,
    exact_match,
    final_number,
    instructions_followed,
    numeric_match,
    sql_match,
)
from safeshape.evals.refusal import refusal_prefix, refusal_style


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """The harness's checks look for data of nltk when they are imported, on the network where it is not there."""
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 18", "18"),
        ("18.", "18"),
        ("$18.00 in all", "18.00"),
        ("it costs $ 1,450,000.50", "1450000.50"),
        ("it falls to -3", "-3"),
        ("a debt of -$5", "-5"),
        ("a debt of $-5", "-5"),
        ("down to \u22124", "-4"),
        ("that is .5 of it", "0.5"),
        ("pages 3-4", "4"),  # a range, not minus four
        ("(10)-3", "3"),
        ("10 - 3", "3"),
        ("one of 1,2,3", "3"),  # a list, not 123
        ("there are 12 of them, not 7\n#### 12 apples for 3", "12"),
        ("#### 3\nwait\n#### 1,200", "1200"),
        ("1e3 and 2", "2"),
        ("none at all", None),
        ("it is 5\n#### none", None),
    ],
)
def test_the_number_an_answer_ends_with(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("#### 18", "18", 1),
        ("The answer is 18.00", "18", 1),
        ("#### 1450000", "1,450,000", 1),
        ("#### -3", "3", 0),
        ("#### 1", "18", 0),  # contained in the reference, and wrong
        ("#### 180", "18", 0),
        ("#### 0.18", "18", 0),
        ("", "18", 0),
        ("18 is what some say, but it is 19", "18", 0),
    ],
)
def test_numbers_are_compared_as_numbers(answer, reference, right):
    assert numeric_match(answer, reference) == right


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(ValueError, match="no number"):
        numeric_match("5", "five")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("**B**", "B"),
        ("(C) Paris", "C"),
        ("A. Paris", "A"),
        ("The answer is D", "D"),
        ("The answer is: (C) because", "C"),
        ("Answer: A", "A"),
        ("Answer: A bird", None),  # an article
        ("Option A is wrong. The answer is B.", "B"),
        ("option A, or option B", None),
        ("The answer is A. No, the answer is B.", None),
        ("A or B", None),
        ("A, B", None),
        ("I'm not sure", None),
        ("I think so", None),
        ("Bananas", None),
        ("", None),
    ],
)
def test_the_letter_an_answer_chooses(answer, letter):
    assert chosen(answer) == letter
    assert choice_letter(answer, "B") == (letter == "B")


def test_exact_match_knows_several_references_and_numbers():
    assert exact_match(" The  Cat. ", "the cat") == 1
    assert exact_match("the cat", "cat") == 0
    assert exact_match("dog", ["cat", "dog"]) == 1
    assert exact_match("5", 5) == 1  # JSON has numbers


def test_sql_is_compared_but_for_its_layout():
    assert sql_match('```sql\nSELECT a FROM t WHERE b="x";\n```', "select a from t where b = 'x'") == 1
    assert sql_match("SELECT a FROM t WHERE b = 'y'", "select a from t where b = 'x'") == 0
    assert sql_match("SELECT a, b FROM t", "select a,b from t") == 1


def test_instructions_are_checked_one_by_one():
    both = {
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {"num_words": None}],
    }
    assert instructions_followed("a plain answer without capitals", both) == 1
    assert instructions_followed("a plain answer, without capitals", both) == 0
    assert instructions_followed("A Plain Answer Without That", both) == 0
    assert instructions_followed("  ", both) == 0
    repeat = {
        "prompt": "say it again",
        "instruction_id_list": ["combination:repeat_prompt"],
        "kwargs": [{"prompt_to_repeat": "say it again"}],
    }
    assert instructions_followed("say it again. Done.", repeat) == 1
    assert instructions_followed("Done.", repeat) == 0
    with pytest.raises(ValueError, match="no instruction 'mine:own'"):
        instructions_followed("x", {"prompt": "p", "instruction_id_list": ["mine:own"], "kwargs": [{}]})


@pytest.mark.parametrize(
    ("answer", "style"),
    [
        ("I'm sorry, but no.", "hard"),
        ("I\u2019m sorry, no.", "hard"),
        ("**I cannot** do that.", "hard"),
        ("That is a hard question. I will not answer it.", "soft"),
        ("I can't do that. Instead, here is a safe game.", "redirect"),
        ("Sure, step one.", "none"),
        ("A. B. C. I cannot stop now.", "none"),  # after the first three sentences
        ("", "none"),
    ],
)
def test_styles_of_refusal(answer, style):
    assert refusal_style(answer) == style
    assert refusal_prefix(answer) == (style in ("hard", "redirect"))
