"""Abilities through lm-evaluation-harness: its tasks, or YAML tasks of your own, on our model. Extra `lm-eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.evals.metrics import Result, Run
from safeshape.stats import bootstrap, wilson
from safeshape.types import Row


def run_lm_eval(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    run: Run,
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    world: bool = False,
) -> list[Result]:
    """The harness's numbers for each task as rows; intervals are ours, from its verdict on every question.

    Errors: ValueError where the harness is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks lm_eval:NAME need lm-evaluation-harness: pip install 'safeshape[lm-eval]' ({error})"
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"lm_eval_tasks {include_path} is no folder")
    # Without the harness's own tasks where there is a folder: indexing its thousands takes longer than small runs.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}" + (f" in {include_path}" if include_path else "")
            )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    found: Any = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat_template,
        random_seed=run.seed,
        numpy_random_seed=run.seed,
        torch_random_seed=run.seed,
        fewshot_random_seed=run.seed,
    )
    return [one for name, samples in found["samples"].items() for one in _of_task(name, samples, run, world)]


def _of_task(name: str, samples: Sequence[dict[str, Any]], run: Run, world: bool) -> list[Result]:
    """One row for each metric that has a number for every question."""
    results = []
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(str(sample.get("filter", "none")), []).append(sample)
    for chosen, rows in by_filter.items():
        for metric in rows[0]["metrics"]:
            given = [row[metric] for row in rows]
            if not all(isinstance(value, bool | int | float | np.number) for value in given):
                continue  # corpus metrics, such as BLEU, have parts in place of a number
            values = np.array(given, dtype=float)
            low, high = _interval(values)
            row = Row(
                attack=run.attack,
                defence=run.defence,
                model=run.model,
                seed=run.seed,
                metric=metric,
                value=float(values.mean()),
                n=len(values),
                low=low,
                high=high,
                judge="lm_eval",
                world=world,
                settings={"dataset": f"lm_eval:{name}", "filter": chosen},
            )
            results.append(Result(row=row, failed=0))
    return results


def _interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    if set(values.tolist()) <= {0.0, 1.0}:
        return wilson(int(values.sum()), len(values))
    if len(values) < 2:
        return float("-inf"), float("inf")
    return bootstrap(lambda rows: float(values[rows].mean()), np.arange(len(values)))
