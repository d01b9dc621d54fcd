"""Answers against a reference: exact text, final number, letter of a choice, SQL, verifiable instructions."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

# A sign counts where it touches its number and does not join it to what is before: -3 and $-3, not 5-3 or 10 - 3.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+\u2212])?(?:\$\s?[-\u2212]?)?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?![,\d])|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
)
# "A" and "I" are words too: as choices they are marked, or end what is said.
_LETTER = (
    r"(?:[B-HJ-Z]\b(?!['\u2019])|"
    r"[AI](?:(?=[)\]*_\"'.:,;])(?!['\u2019][a-z])|(?=\s*(?:\n|$))|(?=\s+(?:because|since|as|is|for)\b)))"
)
_OPENS = r"[*_(\[\"']*"
_IS = r"(?:\s+(?:is|would\s+be|must\s+be))?"
_ANSWER = re.compile(rf"(?i:\banswer\b{_IS}\s*:?)\s*{_OPENS}({_LETTER})")
_OPTION = re.compile(rf"(?i:\b(?:option|choice)\b{_IS}\s*:?)\s*{_OPENS}({_LETTER})")
_ALONE = re.compile(rf"{_OPENS}([A-Z])(?:[)\]*_\".:,]|'(?![a-z])|\s*$|\s*\n)")
_BOTH = re.compile(r"[A-Z]\s*(?:,|/|&|\band\b|\bor\b)\s*[A-Z]\b(?!')")


def normalised(text: str) -> str:
    """Case, blanks and a final full stop do not count."""
    return " ".join(text.casefold().split()).rstrip(". ")


def exact_match(answer: str, reference: Any) -> float:
    """1 where the answer is the reference, or one of several, but for case, blanks and a final full stop."""
    wanted = reference if isinstance(reference, list | tuple) else [reference]
    return float(normalised(answer) in {normalised(str(text)) for text in wanted})


def number(text: str) -> Decimal | None:
    """A number as people write it: 1,450,000 or $18.00 or -3. None where it is none."""
    found = re.sub(r"[\s,$]", "", text.strip().rstrip(".")).replace("\u2212", "-")
    try:
        value = Decimal(found)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None  # "nan" and "inf" are numbers to the library


def final_number(answer: str) -> Decimal | None:
    """The number an answer ends with: the first after the last `####` or, where there is none, the last of all."""
    _, mark, tail = answer.rpartition("####")
    found = _NUMBER.findall(tail if mark else answer)
    return number(found[0 if mark else -1]) if found else None


def numeric_match(answer: str, reference: Any) -> float:
    """1 where the final numbers are equal as numbers: 18 is 18.00 and $18, but 1 is not 18.

    Differs: the released code of STAR-DSS counts an answer whose text is contained in the reference.
    Errors: ValueError for a reference without a number.
    """
    wanted = final_number(str(reference))
    if wanted is None:
        raise ValueError("the reference holds no number")
    return float(final_number(answer) == wanted)


def chosen(answer: str) -> str | None:
    """The letter an answer chooses: after "answer is", else after "option" or "choice", else at its beginning.

    None where it chooses none; two different letters in the same way are no choice.
    """
    text = answer.strip()
    for pattern in (_ANSWER, _OPTION):
        stated = set(pattern.findall(text))
        if stated:
            return stated.pop() if len(stated) == 1 else None
    alone = _ALONE.match(text)
    return alone.group(1) if alone and not _BOTH.match(text) else None


def choice_letter(answer: str, reference: Any) -> float:
    """1 where the chosen letter is the reference."""
    return float(chosen(answer) == str(reference).strip().upper())


def sql_normalised(text: str) -> str:
    """SQL without case, blanks, quotes' kind, a code fence and a final semicolon; blanks around signs do not count."""
    found = re.sub(r"^```(?:sql)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    found = " ".join(found.casefold().replace('"', "'").replace("`", "'").split()).rstrip("; ")
    return re.sub(r"\s*([=<>!,()]+)\s*", r"\1", found)


def sql_match(answer: str, reference: Any) -> float:
    """1 where both are the same SQL text but for its layout. Queries of equal meaning and other words do not count."""
    return float(sql_normalised(answer) == sql_normalised(str(reference)))


def instruction_checks() -> Mapping[str, Any]:
    """IFEval's checks by their names, from lm-evaluation-harness.

    Errors: ValueError where that library, or what its checks need, is not installed.
    """
    try:
        from langdetect import DetectorFactory
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except (ImportError, LookupError, OSError) as error:
        raise ValueError(
            f"ifeval needs the checks of lm-evaluation-harness: pip install 'safeshape[lm-eval]' ({error})"
        ) from error
    DetectorFactory.seed = 0  # it draws random numbers, and would give one text two languages
    checks: Mapping[str, Any] = INSTRUCTION_DICT
    return checks


def instructions_followed(answer: str, reference: Any) -> float:
    """1 where every verifiable instruction of an IFEval prompt is followed (strict, prompt level).

    `reference`: the row's instruction_id_list and kwargs.
    Errors: ValueError as of `instruction_checks`, or for an instruction that it does not know.
    """
    checks = instruction_checks()
    for name, given in zip(reference["instruction_id_list"], reference["kwargs"], strict=True):
        if name not in checks:
            raise ValueError(f"ifeval has no instruction {name!r}")
        check = checks[name](name)
        check.build_description(**{key: value for key, value in given.items() if value is not None})
        wanted: Mapping[str, Any] = check.get_instruction_args() or {}
        if "prompt" in wanted:
            check.build_description(prompt=reference["prompt"])
        if not answer.strip() or not check.check_following(answer):
            return 0.0
    return 1.0
