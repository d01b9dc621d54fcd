"""What Inspect AI finds: `inspect eval safeshape/advbench --model safeshape/PATH`, and the world's tasks.

Named in pyproject.toml as an entry point of the group inspect_ai, so that Inspect imports it; nothing else does.
"""

from typing import Any

from inspect_ai import Task, task
from inspect_ai.model import modelapi

from safeshape.evals.inspect_bridge import InProcess, inspect_task
from safeshape.evals.suites import SUITES, load_suite
from safeshape.sources import model_path
from safeshape.verbs.eval_setup import open_tools, refuse_worlds_judges, world_tasks


@modelapi(name="safeshape")
class Safeshape(InProcess):
    """`safeshape/PATH`, `safeshape/org/model`, `safeshape/world:llama`."""

    resolve = staticmethod(model_path)


def _register(name: str) -> Any:
    @task(name=name)
    def suite(
        path: str | None = None,
        part: str | None = None,
        kind: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        judge: str | None = None,
        judge_model: str | None = None,
        threshold: int = 4,
        guard: str | None = None,
        guard_model: str | None = None,
        scorers: str = "",
    ) -> Task:
        """A suite. `kind`: which of its tasks, where it makes several (harmful, benign, decline, ability).

        Judge and guard are those of `safeshape eval`.
        """
        tasks = load_suite(name, path, part=part, limit=limit, seed=seed)
        chosen = [one for one in tasks if kind in (None, one.kind)]
        if len(chosen) != 1:
            kinds = ", ".join(one.kind for one in tasks)
            raise ValueError(f"suite {name} makes tasks of kinds {kinds}; choose one with -T kind=...")
        refuse_worlds_judges(chosen[0], judge, guard, guard_model)
        names = [one for one in scorers.split(",") if one]
        return inspect_task(
            chosen[0],
            open_tools(judge=judge, judge_model=judge_model, threshold=threshold, guard=guard, guard_model=guard_model),
            names,
        )

    return suite


REGISTERED = {name: _register(name) for name in SUITES}


@task(name="world")
def world(
    name: str = "attack_success", size: int = 150, seed: int = 0, judge: str = "world", threshold: int = 4
) -> Task:
    """A held-out task of the embedded world: a test bench, never evidence about real models."""
    (found,) = world_tasks(name, size=size, seed=seed)
    return inspect_task(found, open_tools(judge=judge, threshold=threshold))
