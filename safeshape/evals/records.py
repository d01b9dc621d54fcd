"""The records of evaluations: tasks, answers, what scorers say of them, and rates as rows of results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from safeshape.data import Message
from safeshape.stats import wilson
from safeshape.types import Row

# What a task's prompts are: requests to be declined because they are harmful; harmless ones that should be served;
# ones to be declined for another reason; questions with a right answer; or anything with a criterion of its own.
Kind = Literal["harmful", "benign", "decline", "ability", "own"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts and how their answers are measured. Sequences beside `prompts` are empty or as long.

    `prompts`: conversations; where the last message is the assistant's, it is to be continued. `success(index, answer)`
    decides what the task itself counts, which need not be something good: see its name; None where only scorers speak.
    `references`: what scorers compare answers with. `groups`: which prompts are attempts at the same request.
    `scorers`: names of those it is measured by where the user asks for no others. `notes`: what was left out, and why.
    `drawn`: how many answers its attack wants drawn at each prompt, and the temperature (None: any).
    """

    name: str
    prompts: Sequence[Sequence[Message]]
    max_new_tokens: int
    success: Callable[[int, str], bool] | None = None
    kind: Kind = "own"
    dataset: str = ""
    ids: Sequence[str] = ()
    categories: Sequence[str | None] = ()
    references: Sequence[Any] = ()
    groups: Sequence[str] = ()
    scorers: Sequence[str] = ()
    notes: Sequence[str] = ()
    drawn: tuple[int, float | None] = (1, None)
    world: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answers to a task and which of them count, in the order of its prompts."""

    task: str
    answers: tuple[str, ...]
    successes: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer of the model: `index` of its prompt, number of the sample; `text` None where it failed, with why."""

    index: int
    sample: int
    text: str | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a scorer says of one answer. `value` None: no verdict could be had, and `error` says why."""

    value: float | None
    label: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The verdicts of one scorer on the answers to a task, one for each answer, in the same order."""

    task: Task
    scorer: str
    judge: str
    decoding: str
    answers: Sequence[Answered]
    verdicts: Sequence[Verdict]
    settings: Mapping[str, float | str] = field(default_factory=dict)


def rate_row(outcome: Outcome, *, attack: str, defence: str, model: str, seed: int, judge: str, world: bool) -> Row:
    """The outcome as a rate with its n and 95 % Wilson interval."""
    n, count = len(outcome.successes), sum(outcome.successes)
    low, high = wilson(count, n)
    return Row(
        attack=attack,
        defence=defence,
        model=model,
        seed=seed,
        metric=outcome.task,
        value=count / n,
        n=n,
        low=low,
        high=high,
        judge=judge,
        world=world,
    )
