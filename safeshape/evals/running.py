"""Running a task on a model in memory, in one call: what the demo and training callbacks need."""

from collections.abc import Callable

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.evals.records import Outcome, Task
from safeshape.models import generate


def run_task(
    task: Task,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Greedy answers to every prompt of the task, judged by its own criterion.

    Errors: ValueError for a task without one.
    """
    if task.success is None:
        raise ValueError(f"task {task.name!r} has no criterion of its own; it needs scorers (`safeshape eval`)")
    answers = generate(model, tokenizer, task.prompts, max_new_tokens=task.max_new_tokens, progress=progress)
    successes = tuple(task.success(index, answer) for index, answer in enumerate(answers))
    return Outcome(task=task.name, answers=tuple(answers), successes=successes)
