"""Abilities through lm-evaluation-harness: its tasks, or YAML tasks of your own, on our model. Extra `lm-eval`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safeshape.evals.answering import LocalModel
from safeshape.evals.metrics import Result, Run
from safeshape.stats import bootstrap, wilson
from safeshape.store import content_key
from safeshape.types import Row

Sample = Mapping[str, Any]


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks: its own, or those of a folder.

    Errors: ValueError where the harness is not installed, or has no such task.
    """
    try:
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
    return manager


def run_lm_eval(
    model: LocalModel,
    tasks: Sequence[str],
    run: Run,
    *,
    keep: str | Path | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    world: bool = False,
) -> list[Result]:
    """The harness's numbers for each task as rows; intervals are ours, from its verdict on every question.

    `keep`: where what the model gave is kept, one file for each model beside it, so that a killed run goes on. A group
    of tasks has rows of its own, over all its questions, besides those of its members.
    Errors: ValueError as of `task_manager`, and for a mean over one question, which has no interval.
    """
    manager = task_manager(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    identity = content_key("lm_eval", model.identity())[:16]
    found: Any = simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=model.batch_size, backend="causal"),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        use_cache=None if keep is None else f"{keep}.lm_eval-{identity}",
        apply_chat_template=chat_template,
        random_seed=run.seed,
        numpy_random_seed=run.seed,
        torch_random_seed=run.seed,
        fewshot_random_seed=run.seed,
    )
    samples: dict[str, Sequence[Sample]] = dict(found["samples"])
    members: Mapping[str, Sequence[str]] = found.get("group_subtasks", {})
    for name in tasks:
        if name not in samples:
            samples[name] = [sample for leaf in _leaves(name, members) for sample in samples[leaf]]
    return [one for name, rows in samples.items() for one in _of_task(name, rows, run, world)]


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> Iterable[str]:
    below = members.get(name)
    return [leaf for one in below for leaf in _leaves(one, members)] if below else [name]


def _of_task(name: str, samples: Sequence[Sample], run: Run, world: bool) -> list[Result]:
    """One row for each metric that has a number for every question."""
    results = []
    by_filter: dict[str, list[Sample]] = {}
    for sample in samples:
        by_filter.setdefault(str(sample.get("filter", "none")), []).append(sample)
    for chosen, rows in by_filter.items():
        for metric in rows[0]["metrics"]:
            given = [row.get(metric) for row in rows]
            if not all(isinstance(value, bool | int | float | np.number) for value in given):
                continue  # corpus metrics, such as BLEU, have parts in place of a number
            values = np.array(given, dtype=float)
            low, high = _interval(values, f"lm_eval:{name}: {metric}")
            row = Row(
                attack=run.attack,
                defence=run.defence,
                model=run.model,
                seed=run.seed,
                metric=metric,
                value=float(values.mean()),
                n=len(values),
                low=min(low, float(values.mean())),
                high=max(high, float(values.mean())),
                judge="lm_eval",
                world=world,
                settings={"dataset": f"lm_eval:{name}", "filter": chosen},
            )
            results.append(Result(row=row, failed=0))
    return results


def _interval(values: np.ndarray[Any, np.dtype[np.float64]], what: str) -> tuple[float, float]:
    if set(values.tolist()) <= {0.0, 1.0}:
        return wilson(int(values.sum()), len(values))
    if len(values) < 2:
        raise ValueError(f"{what} is a mean over one question, which has no interval; ask more")
    return bootstrap(lambda rows: float(values[rows].mean()), np.arange(len(values)))
