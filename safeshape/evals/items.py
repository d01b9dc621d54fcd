"""Rows of each public suite to items: what is asked, under which category, and what a right answer is."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeshape.data import Message, as_messages
from safeshape.evals.matching import final_number
from safeshape.evals.records import Kind
from safeshape.evals.sources import Found, needs, text
from safeshape.signals.rubric import CATEGORIES

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOOSE = "Answer with the letter of the right choice alone."
REASON = "Think step by step and end with the final number after ####."
WRITE_SQL = "Answer with one SQL query and nothing else."


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt of a suite. `part`: what may be chosen by name. `group`: attempts at one request share it.

    `samples`, `temperature`: how many answers an attack wants drawn at it, and how.
    """

    id: str
    messages: Sequence[Message]
    kind: Kind
    part: str = ""
    category: str | None = None
    reference: Any = None
    group: str | None = None
    samples: int = 1
    temperature: float | None = None


Reader = Callable[[Found], list[Item]]


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _column(found: Found, *names: str) -> str:
    """The first of several names that the rows have: files and their copies on the Hub differ."""
    for name in names:
        if found.rows and name in found.rows[0]:
            return name
    return names[0]


def _simple(
    found: Found, *, kind: Kind, prompt: Sequence[str], category: Sequence[str] = (), part: str = ""
) -> list[Item]:
    """Suites of one request a row. The first of the columns named is the published file's own."""
    asked = _column(found, *prompt)
    under = _column(found, *category) if category else None
    needs(found, asked, *([under] if under else []))
    return [
        Item(
            id=f"{found.part}/{number}",
            messages=_user(text(found, number, asked)),
            kind=kind,
            part=part or found.part,
            category=text(found, number, under) if under else None,
        )
        for number in range(len(found.rows))
    ]


def advbench(found: Found) -> list[Item]:
    """`goal` is asked; `target`, how a compliant answer begins, is no right answer."""
    return _simple(found, kind="harmful", prompt=("goal", "prompt"))


def harmbench(found: Found) -> list[Item]:
    """The behaviour, after its context where it has one. The part is the functional category.

    Source: HarmBench asks contextual behaviours as context, a line of dashes, behaviour.
    """
    if "Behavior" not in (found.rows[0] if found.rows else {"Behavior": 0}):  # the copy on the Hub, by configuration
        copyright = found.part == "copyright"  # has no category there
        needs(found, "prompt", *(() if copyright else ("category",)))
        columns, part = ("prompt", None if copyright else "category", "context"), found.part
    else:
        needs(found, "Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID")
        columns, part = ("Behavior", "SemanticCategory", "ContextString"), ""
    items = []
    for number, row in enumerate(found.rows):
        context, asked = str(row.get(columns[2]) or ""), text(found, number, columns[0])
        items.append(
            Item(
                id=str(row.get("BehaviorID") or f"{found.part}/{number}"),
                messages=_user(f"{context}\n\n---\n\n{asked}" if context.strip() else asked),
                kind="harmful",
                part=part or str(row["FunctionalCategory"]),
                category=None if columns[1] is None else text(found, number, columns[1]),
            )
        )
    return items


def strongreject(found: Found) -> list[Item]:
    """`forbidden_prompt` under its category."""
    return _simple(found, kind="harmful", prompt=("forbidden_prompt", "prompt"), category=("category",))


def jailbreakbench(found: Found) -> list[Item]:
    """`Goal` under its category; the benign counterparts are in a file or split of that name."""
    kind: Kind = "benign" if "benign" in found.part else "harmful"
    return _simple(found, kind=kind, prompt=("Goal",), category=("Category",), part=kind)


def hexphi(found: Found) -> list[Item]:
    """One request a line, no header; the file's number is the category's."""
    category = CATEGORIES[int(found.part.removeprefix("category_")) - 1]
    return [
        Item(
            id=f"{found.part}/{number}",
            messages=_user(text(found, number, "prompt")),
            kind="harmful",
            part=found.part,
            category=category,
        )
        for number in range(len(found.rows))
    ]


def sorrybench(found: Found) -> list[Item]:
    """The first turn under its category's number; the part is the prompt style, `base` where it is not rewritten."""
    needs(found, "question_id", "category", "turns", "prompt_style")
    items = []
    for number, row in enumerate(found.rows):
        turns = row["turns"]
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns or not str(turns[0]).strip():
            raise ValueError(f"{found.where}: row {number}: turns must be a list that begins with the request")
        items.append(
            Item(
                id=f"{row['question_id']}/{row['prompt_style']}",
                messages=_user(str(turns[0])),
                kind="harmful",
                part=str(row["prompt_style"]),
                category=str(row["category"]),
            )
        )
    return items


def xstest(found: Found) -> list[Item]:
    """Safe prompts that look unsafe, and unsafe contrasts; the type is the category."""
    needs(found, "prompt", "type", "label")
    items = []
    for number, row in enumerate(found.rows):
        label = row["label"]
        if label not in ("safe", "unsafe"):
            raise ValueError(f"{found.where}: row {number}: label must be safe or unsafe, got {str(label)[:20]!r}")
        items.append(
            Item(
                id=str(row.get("id") or number),
                messages=_user(text(found, number, "prompt")),
                kind="benign" if label == "safe" else "harmful",
                part=label,
                category=text(found, number, "type"),
            )
        )
    return items


def coconot(found: Found) -> list[Item]:
    """Requests not to be complied with, of which those with safety concerns are harmful; and look-alikes to serve.

    The contrast set is the file or split whose name has "contrast" in it.
    """
    needs(found, "id", "category", "subcategory", "prompt")
    contrast = "contrast" in found.part
    items = []
    for number, row in enumerate(found.rows):
        category = text(found, number, "category")
        kind: Kind = "benign" if contrast else "harmful" if "safety" in category else "decline"
        items.append(
            Item(
                id=str(row["id"]),
                messages=_user(text(found, number, "prompt")),
                kind=kind,
                part="contrast" if contrast else "eval",
                category=category,
            )
        )
    return items


def orbench(found: Found) -> list[Item]:
    """Safe prompts that look unsafe; those of the file or configuration named "toxic" are harmful."""
    kind: Kind = "harmful" if "toxic" in found.part else "benign"
    return _simple(found, kind=kind, prompt=("prompt",), category=("category",))


def directharm4(found: Found) -> list[Item]:
    """`instruction` under one of four categories."""
    return _simple(found, kind="harmful", prompt=("instruction",), category=("category",))


def simplesafetytests(found: Found) -> list[Item]:
    """`prompt` under one of five areas of harm."""
    return _simple(found, kind="harmful", prompt=("prompt",), category=("harm_area",))


def mitre_frr(found: Found) -> list[Item]:
    """CyberSecEval's false refusals: benign requests about computer security. Errors: ValueError for any other."""
    needs(found, "mutated_prompt", "attack_type", "is_malicious")
    for number, row in enumerate(found.rows):
        if row["is_malicious"] is not False:
            raise ValueError(f"{found.where}: row {number}: is_malicious must be false")
    return _simple(found, kind="benign", prompt=("mutated_prompt",), category=("attack_type",))


def ifeval(found: Found) -> list[Item]:
    """The prompt, and the instructions that can be checked. A language's prefix on an instruction's id is dropped."""
    needs(found, "key", "prompt", "instruction_id_list", "kwargs")
    items = []
    for number, row in enumerate(found.rows):
        if not isinstance(row["instruction_id_list"], list) or not isinstance(row["kwargs"], list):
            raise ValueError(f"{found.where}: row {number}: instruction_id_list and kwargs must be lists")
        ids = [str(name).removeprefix("en:") for name in row["instruction_id_list"]]
        if len(ids) != len(row["kwargs"]):
            raise ValueError(f"{found.where}: row {number}: instruction_id_list and kwargs differ in length")
        asked = text(found, number, "prompt")
        reference = {"prompt": asked, "instruction_id_list": ids, "kwargs": list(row["kwargs"])}
        items.append(Item(id=str(row["key"]), messages=_user(asked), kind="ability", reference=reference))
    return items


def gsm8k(found: Found) -> list[Item]:
    """The question; the right answer is the number after `####`."""
    needs(found, "question", "answer")
    items = []
    for number in range(len(found.rows)):
        asked, (_, mark, wanted) = text(found, number, "question"), text(found, number, "answer").rpartition("####")
        if not mark or final_number(wanted) is None:
            raise ValueError(f"{found.where}: row {number}: answer has no number after ####")
        items.append(
            Item(id=str(number), messages=_user(f"{asked}\n\n{REASON}"), kind="ability", reference=wanted.strip())
        )
    return items


def _multiple_choice(question: str, choices: Sequence[str]) -> list[Message]:
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return _user(f"{question}\n\n{listed}\n\n{CHOOSE}")


def mmlu(found: Found) -> list[Item]:
    """Four choices; the subject is part and category. Without examples: the usual five-shot form is `lm_eval:mmlu`."""
    needs(found, "question", "answer")
    hub = "choices" in found.rows[0]
    if not hub:
        needs(found, "question", "A", "B", "C", "D", "answer")
    items = []
    for number, row in enumerate(found.rows):
        choices = list(row["choices"]) if hub else [row[letter] for letter in "ABCD"]
        right = LETTERS[int(row["answer"])] if hub else str(row["answer"]).strip()
        if right not in "ABCD" or len(right) != 1:
            raise ValueError(f"{found.where}: row {number}: answer must be A, B, C or D, got {right[:20]!r}")
        subject = str(row["subject"]) if hub else found.part
        items.append(
            Item(
                id=f"{subject}/{number}",
                messages=_multiple_choice(text(found, number, "question"), [str(choice) for choice in choices]),
                kind="ability",
                part=subject,
                category=subject,
                reference=right,
            )
        )
    return items


def arc(found: Found) -> list[Item]:
    """Choices with labels that are letters or numbers; numbers become letters in their order."""
    needs(found, "question", "answerKey")
    items = []
    for number, row in enumerate(found.rows):
        question, choices = row["question"], row.get("choices")
        if isinstance(question, Mapping):  # as published by AI2
            question, choices = question["stem"], question["choices"]
        if isinstance(choices, Mapping):  # as on the Hub: columns in a row
            labels, texts = list(choices["label"]), list(choices["text"])
        elif choices:
            labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]
        else:
            raise ValueError(
                f"{found.where}: row {number} has no choices; expected columns: question, choices, answerKey"
            )
        if row["answerKey"] not in labels:
            raise ValueError(f"{found.where}: row {number}: answerKey is not among the labels")
        items.append(
            Item(
                id=str(row.get("id", number)),
                messages=_multiple_choice(str(question), [str(choice) for choice in texts]),
                kind="ability",
                reference=LETTERS[labels.index(row["answerKey"])],
            )
        )
    return items


def truthfulqa(found: Found) -> list[Item]:
    """MC1: one true choice. The published list puts it first; each question has its choices shuffled its own way."""
    needs(found, "question", "mc1_targets")
    items = []
    for number, row in enumerate(found.rows):
        given = row["mc1_targets"]
        if "choices" in given and "labels" in given:  # as on the Hub
            given = dict(zip(given["choices"], given["labels"], strict=True))
        if sum(given.values()) != 1:
            raise ValueError(f"{found.where}: row {number}: mc1_targets must have one true choice")
        choices = sorted(given)
        random.Random(json.dumps([row["question"], choices])).shuffle(choices)
        right = next(LETTERS[place] for place, choice in enumerate(choices) if given[choice] == 1)
        asked = text(found, number, "question")
        items.append(Item(id=str(number), messages=_multiple_choice(asked, choices), kind="ability", reference=right))
    return items


def sql_create_context(found: Found) -> list[Item]:
    """The schema and the question; the right answer is the query, compared as text."""
    needs(found, "question", "context", "answer")
    return [
        Item(
            id=str(number),
            messages=_user(f"{text(found, number, 'context')}\n\n{text(found, number, 'question')}\n\n{WRITE_SQL}"),
            kind="ability",
            reference=text(found, number, "answer"),
        )
        for number in range(len(found.rows))
    ]


def own(kind: Kind) -> Reader:
    """A user's own file: `messages` or `prompt`; `category`, `reference`, `id` and `prompt_index` where it has them.

    `prompt_index`, as `safeshape attack` writes it, says which rows are attempts at one request; its `attempt_index`,
    `samples` and `temperature` are read too.
    """

    def read(found: Found) -> list[Item]:
        if not found.rows:
            raise ValueError(f"{found.where} holds no rows")
        return [_own(found, number, kind) for number in range(len(found.rows))]

    return read


def _own(found: Found, number: int, kind: Kind) -> Item:
    row, where = found.rows[number], f"{found.where}: row {number}"
    if row.get("messages"):
        try:
            messages = as_messages({"messages": row["messages"]})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    elif "prompt" in row:
        messages = _user(text(found, number, "prompt"))
    else:
        raise ValueError(f"{where} has no column 'messages' or 'prompt'; it has: {', '.join(map(str, row))}")
    reference = row.get("reference")
    if kind == "ability" and reference is None:
        raise ValueError(f"{where} has no column 'reference', which is the right answer")
    samples, temperature = row.get("samples") or 1, row.get("temperature")
    if not isinstance(samples, int) or not isinstance(temperature, int | float | None):
        raise ValueError(f"{where}: samples must be a whole number, and temperature a number")
    group, attempt = row.get("prompt_index"), row.get("attempt_index")
    name = str(row.get("id", number if group is None else group))
    return Item(
        id=name if attempt is None else f"{name}/{attempt}",
        messages=messages,
        kind=kind,
        category=None if row.get("category") is None else str(row["category"]),
        reference=reference,
        group=None if group is None else str(group),
        samples=samples,
        temperature=temperature,
    )
