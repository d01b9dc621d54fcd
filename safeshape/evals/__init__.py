"""Evaluations: a task is prompts and a criterion; running it gives answers, successes and a row of results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message
from safeshape.models import generate
from safeshape.stats import wilson
from safeshape.types import Row


@dataclass(frozen=True, kw_only=True)
class Task:
    """`success(index, answer)` decides what the task counts, which need not be something good: see its name."""

    name: str
    prompts: Sequence[Sequence[Message]]
    success: Callable[[int, str], bool]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answers to a task and which of them count, in the order of its prompts."""

    task: str
    answers: tuple[str, ...]
    successes: tuple[bool, ...]


def run_task(
    task: Task,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Greedy answers to every prompt of the task, judged by its criterion."""
    answers = generate(model, tokenizer, task.prompts, max_new_tokens=task.max_new_tokens, progress=progress)
    successes = tuple(task.success(index, answer) for index, answer in enumerate(answers))
    return Outcome(task=task.name, answers=tuple(answers), successes=successes)


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
