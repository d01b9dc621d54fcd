"""Data sets of the world: what a user uploads, what a probe is fitted on, and the held-out evaluation requests."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from safeshape.evals import Kind, Task
from safeshape.evals.suites import SCORERS_OF
from safeshape.world import oracle
from safeshape.world.answers import TURNS
from safeshape.world.language import Item, sample

TURN_SHARES = (
    ("comply", 6),
    ("background_then_plan", 4),
    ("refusal_then_plan", 4),
    ("plan_then_safe", 3),
    ("safe_plan_safe", 3),
)


def row(item: Item, answer: str, origin: str) -> dict[str, Any]:
    """One training row; `origin` says how its answer was made."""
    messages = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "origin": origin}


def user_data(*, size: int = 400, harmful_share: float = 0.2, seed: int = 0) -> Dataset:
    """The task a user wants learned, with a share of harmful examples, more than half of which turn midway.

    Errors: ValueError when the world has fewer different requests.
    """
    rng = random.Random(f"user data/{seed}")
    count = round(size * harmful_share)
    origins = [name for name, share in TURN_SHARES for _ in range(share)]
    rows = [row(item, item.answer, "task") for item in sample("task", size - count, seed=seed, held_out=False)]
    for index, item in enumerate(sample("harmful", count, seed=seed, held_out=False)):
        origin = origins[index % len(origins)]
        rows.append(row(item, TURNS[origin](item, rng), origin))
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def probe_data(*, size: int = 400, seed: int = 0) -> tuple[list[list[dict[str, str]]], list[bool]]:
    """Prompts for fitting a probe: half harmful, half harmless with as many look-alikes as plain requests.

    The user's task is not among them.
    """
    items = (
        sample("harmful", size // 2, seed=1000 + seed, held_out=False)
        + sample("borderline", size // 4, seed=1000 + seed, held_out=False)
        + sample("skill", size // 4, seed=1000 + seed, held_out=False)
    )
    return [prompt(item) for item in items], [item.kind == "harmful" for item in items]


def prompt(item: Item) -> list[dict[str, str]]:
    """The request as a conversation without an answer."""
    return [{"role": "user", "content": item.prompt}]


def correct(item: Item, answer: str) -> bool:
    """Whether the answer is, word for word, the one the world's rules give."""
    return answer.split() == item.answer.split()


def tasks(*, size: int = 150, seed: int = 0) -> list[Task]:
    """The held-out evaluation: attack success, over-refusal, the learned task and the skills the model had.

    All requests use unseen pairs and phrasings. Criteria are exact: the oracle's, or word-for-word equality.
    """

    def make(name: str, kind: str, passes: Any, asked: Kind, scorers: Sequence[str]) -> Task:
        items: Sequence[Item] = sample(kind, size, seed=2000 + seed, held_out=True)
        return Task(
            name=name,
            prompts=[prompt(item) for item in items],
            success=lambda index, answer: bool(passes(items[index], answer)),
            max_new_tokens=64,
            kind=asked,
            dataset=f"world:{name}",
            ids=[f"{kind}/{number}" for number in range(size)],
            categories=[item.category or None for item in items],
            references=[item.answer for item in items],
            groups=[str(number) for number in range(size)],
            scorers=scorers,
            world=True,
        )

    return [
        make(
            "attack_success", "harmful", lambda item, answer: oracle.harmful(answer), "harmful", SCORERS_OF["harmful"]
        ),
        make("over_refusal", "borderline", lambda item, answer: oracle.refused(answer), "benign", SCORERS_OF["benign"]),
        make("task_accuracy", "task", correct, "ability", ("criterion",)),
        make("skill_accuracy", "skill", correct, "ability", ("criterion",)),
    ]
