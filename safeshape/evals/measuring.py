"""A run: every task asked greedily and sampled, every answer through every scorer, verdicts to numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from safeshape.evals.answering import Answering, Ask, answers
from safeshape.evals.records import Answered, Measured, Task
from safeshape.evals.scorers import Tools, scorer_of
from safeshape.models import Sampling
from safeshape.store import Store

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the model is asked. `samples`: sampled answers to every prompt, drawn by `sampling` and `seed`.

    `max_new_tokens` None: each task's own.
    """

    greedy: bool = True
    samples: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Names:
    """Who judges, as rows of results call them."""

    judge: str = "none"
    guard: str = "none"
    refuses: str = "none"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The answers to a task in one way of decoding; `reused`: how many of them the store had."""

    task: Task
    decoding: str
    answers: Sequence[Answered]
    reused: int


def ask_all(model: Answering, tasks: Sequence[Task], plan: Plan, store: Store, progress: Progress) -> list[Asked]:
    """All answers to all tasks."""
    found = []
    for task in tasks:
        length = plan.max_new_tokens or task.max_new_tokens
        ways: dict[str, list[Ask]] = {}
        if plan.greedy:
            ways["greedy"] = [Ask(index=i, messages=m, max_new_tokens=length) for i, m in enumerate(task.prompts)]
        if plan.samples:
            ways["sampled"] = [
                Ask(index=i, messages=m, max_new_tokens=length, sampling=plan.sampling, seed=plan.seed, sample=sample)
                for i, m in enumerate(task.prompts)
                for sample in range(plan.samples)
            ]
        for decoding, asks in ways.items():
            label = f"{task.name}, {decoding}"
            told, reused = answers(model, asks, store, progress=partial(progress, label))
            found.append(Asked(task=task, decoding=decoding, answers=told, reused=reused))
    return found


def judge_all(
    asked: Sequence[Asked],
    scorers: Mapping[str, Sequence[str]],
    tools: Tools,
    plan: Plan,
    names: Names,
    progress: Progress = lambda label, done, total: None,
) -> list[Measured]:
    """Every scorer's verdicts. `scorers`: their names by task."""
    found = []
    drawn = {"temperature": plan.sampling.temperature, "top_p": plan.sampling.top_p, "samples": float(plan.samples)}
    for place, one in enumerate(asked):
        for name in scorers[one.task.name]:
            progress("tasks judged", place, len(asked))
            scorer = scorer_of(name)
            settings: Mapping[str, float | str] = drawn if one.decoding == "sampled" else {}
            if name == "guard":
                settings = {**settings, "guard_threshold": tools.guard_threshold}
            found.append(
                Measured(
                    task=one.task,
                    scorer=name,
                    judge=_by(one.task, name, scorer.by, tools, names),
                    decoding=one.decoding,
                    answers=one.answers,
                    verdicts=scorer.run(one.task, one.answers, tools),
                    settings=settings,
                )
            )
    if asked:
        progress("tasks judged", len(asked), len(asked))
    return found


def _by(task: Task, scorer: str, by: str, tools: Tools, names: Names) -> str:
    if scorer == "refusal" and tools.refuses is not None:
        return names.refuses
    if by == "own":
        return scorer
    if by == "task":
        return "oracle" if task.world else "criterion"
    return {"judge": names.judge, "guard": names.guard}.get(by, by)
