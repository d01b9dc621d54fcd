"""Tasks, model, judge and guard from the settings of `safeshape eval`."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safeshape import world
from safeshape.client import Client
from safeshape.config import EvalConfig
from safeshape.config.judge import judge_kind
from safeshape.config.naming import named
from safeshape.data import Message
from safeshape.evals import Task
from safeshape.evals.answering import Answering, LocalModel, ServerModel, load_model
from safeshape.evals.grading import Grader
from safeshape.evals.measuring import Names
from safeshape.evals.scorers import Tools, check_scorers, check_tools
from safeshape.evals.suites import OWN, SUITES, load_suite
from safeshape.provenance import RECORD
from safeshape.report.from_world import is_world
from safeshape.signals.ensembles import load_scorer
from safeshape.signals.judges import Judge, Judging
from safeshape.signals.judges.in_process import InProcess
from safeshape.signals.judges.remote import Remote
from safeshape.sources import model_path
from safeshape.store import Store
from safeshape.world import oracle
from safeshape.world.data import tasks as all_world_tasks
from safeshape.world.judge import load_judge

LM_EVAL = "lm_eval:"


def world_tasks(name: str = "", *, size: int | None = None, seed: int = 0) -> list[Task]:
    """The world's held-out tasks, or one of them. Errors: ValueError for an unknown one."""
    found = all_world_tasks(seed=seed) if size is None else all_world_tasks(size=size, seed=seed)
    if not name:
        return found
    if name not in [task.name for task in found]:
        raise ValueError(f"the world has no task {name!r}; it has: {', '.join(task.name for task in found)}")
    return [task for task in found if task.name == name]


def tasks_of(config: EvalConfig) -> list[Task]:
    """The tasks that are named, but those of lm-evaluation-harness. Errors: ValueError in one sentence."""
    found: list[Task] = []
    for spec in config.tasks:
        if spec.startswith(LM_EVAL):
            continue
        head, given, path = spec.partition("=")
        name, _, part = head.partition(":")
        if name == "world":
            if given:
                raise ValueError("task 'world' is built in and takes no file")
            found += world_tasks(part, size=config.limit, seed=config.seed)
        elif name in SUITES or not part:
            named(name, SUITES, "task")
            if given and not path:
                raise ValueError(f"task {spec!r} names no file after the equals sign")
            found += load_suite(name, path or None, part=part or None, limit=config.limit, seed=config.seed)
        else:
            made: Any = named(head, {}, "task")
            tasks = made() if callable(made) else made
            found += [tasks] if isinstance(tasks, Task) else list(tasks)
    names = [task.name for task in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are called {name!r}")
    return [_for_this_run(config, task) for task in found]


def _for_this_run(config: EvalConfig, task: Task) -> Task:
    """The task, marked as of the world where it is. Errors: ValueError where it does not fit the run's settings."""
    refuse_worlds_judges(task, config.judge, config.guard, config.guard_model)
    samples, temperature = task.drawn
    if (samples > 1 or temperature is not None) and (
        config.samples != samples or temperature not in (None, config.temperature)
    ):
        at = "" if temperature is None else f" --temperature {temperature:g}"
        raise ValueError(f"the attack in task {task.name!r} wants sampled answers; give --samples {samples}{at}")
    return replace(task, world=True) if on_world(config) else task


def on_world(config: EvalConfig) -> bool:
    """Whether all numbers of the run are of the embedded world, whatever is asked: its model, judge or guard is."""
    started_from = (_record(config) or {}).get("model", config.model_name_or_path)
    return bool(_worlds_judges(config.judge, config.guard, config.guard_model)) or is_world(started_from)


def refuse_worlds_judges(task: Task, judge: str | None, guard: str | None, guard_model: str | None) -> None:
    """Errors: ValueError where the world's oracle or guard would judge a public suite, which it cannot read."""
    suite = task.dataset.partition(":")[0].removesuffix(f"_{task.kind}")
    if task.world or suite not in SUITES or suite in OWN:
        return
    for name in _worlds_judges(judge, guard, guard_model):
        raise ValueError(f"{name} knows the embedded world only; task {task.name!r} is not of it")


def _worlds_judges(judge: str | None, guard: str | None, guard_model: str | None) -> list[str]:
    found = [f"judge {judge!r}"] if judge is not None and judge_kind(judge) == "oracle" else []
    return [*found, "guard 'world'"] if guard == "world" and guard_model is None else found


def made_by(config: EvalConfig) -> tuple[str, str]:
    """What rows call the model and its defence unless told: by `safeshape.json` where it is one of ours.

    Models tuned from one model bear its name, so that a report compares them. Errors: ValueError for a broken record.
    """
    name, record = str(config.model_name_or_path or config.server_model), _record(config)
    if record is None:
        return _called(name), "none"
    try:
        made = record["policy"] if record.get("defence") is None else record["defence"]
        return _called(record["model"]), str(made["name"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}/{RECORD} is no record of a training: {error!r}; give --name and --defence") from error


def _called(model: str) -> str:
    """A model's short name, the same for the model itself and for what was tuned from it; no folder of the machine."""
    short = Path(model).name or model
    return f"world:{short.removeprefix('world:')}" if is_world(model) else short


def _record(config: EvalConfig) -> dict[str, Any] | None:
    """`safeshape.json` of the model's folder, where it has one. Errors: ValueError for a broken one."""
    path = Path(str(config.model_name_or_path)) / RECORD
    if config.model_name_or_path is None or not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a training: {error!r}; give --name and --defence") from error


def harness_tasks(config: EvalConfig) -> list[str]:
    """The tasks of lm-evaluation-harness. Errors: ValueError where it is not there, or has no such task."""
    names = [spec.removeprefix(LM_EVAL) for spec in config.tasks if spec.startswith(LM_EVAL)]
    if not names:
        return names
    if config.server is not None:
        raise ValueError("lm_eval tasks need the model in this process; leave out --server")
    from safeshape.evals.lm_eval_bridge import task_manager

    task_manager(names, config.lm_eval_tasks)
    return names


def scorers_for(config: EvalConfig, tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The scorers of every task. Errors: ValueError for unknown ones, and what they cannot measure."""
    found = {}
    for task in tasks:
        names = list(dict.fromkeys(config.scorers or task.scorers or ("criterion",)))
        if config.guard is not None and task.kind == "harmful" and "guard" not in names:
            names.append("guard")
        if not config.scorers and config.judge is None and "guard" in names:
            names = [name for name in names if name != "judge"]  # the guard speaks alone, and is named in the rows
        check_scorers(task, names)
        found[task.name] = names
    return found


@contextlib.contextmanager
def opened_model(config: EvalConfig) -> Iterator[Answering]:
    """The model that is measured. Errors: ValueError or OSError when it cannot be had."""
    model = open_model(config)
    try:
        yield model
    finally:
        model.close()


def open_model(config: EvalConfig) -> Answering:
    """As `opened_model`; the caller closes it."""
    if config.server is not None:
        client = Client(
            config.server,
            model=str(config.server_model),
            concurrency=config.concurrency,
            timeout_s=config.timeout,
            retries=config.retries,
            key_variable=config.api_key_variable,
        )
        request = dict(config.request) if isinstance(config.request, Mapping) else {}
        try:
            return ServerModel(client, request=request)
        except ValueError:
            client.close()
            raise
    name = str(config.model_name_or_path)
    model, tokenizer = load_model(model_path(name), revision=config.revision, dtype=config.dtype, device=config.device)
    return LocalModel(model, tokenizer, name=name, batch_size=config.batch_size)


@contextlib.contextmanager
def opened_store(config: EvalConfig, output: Path) -> Iterator[Store]:
    """The store of answers and verdicts; the output folder is there from now on."""
    if config.store is not None and not Path(config.store).parent.is_dir():
        raise ValueError(f"store {config.store} is in a folder that does not exist")
    with contextlib.ExitStack() as stack:
        own = None if config.store is None else stack.enter_context(Store(config.store))
        output.mkdir(parents=True, exist_ok=True)
        yield own or stack.enter_context(Store(output / "eval.sqlite"))


@contextlib.contextmanager
def opened_tools(config: EvalConfig, tasks: Sequence[Task], scorers: Mapping[str, Sequence[str]]) -> Iterator[Tools]:
    """Judge, guard and grader, which keep nothing yet. Errors: ValueError where a scorer lacks one of them."""
    tools = open_tools(
        judge=config.judge,
        judge_model=config.judge_model,
        judge_settings=config.judge_settings if isinstance(config.judge_settings, dict) else None,
        threshold=config.judge_threshold,
        guard=config.guard,
        guard_model=config.guard_model,
        guard_threshold=config.guard_threshold,
        device=config.device,
        versus=read_versus(config.versus),
    )
    try:
        for task in tasks:
            check_tools(task, scorers[task.name], tools)
        yield tools
    finally:
        if tools.judge is not None:
            tools.judge.close()


@contextlib.contextmanager
def keeping(config: EvalConfig, tools: Tools, store: Store) -> Iterator[Tools]:
    """The same tools, keeping verdicts in a store. A judge of the user's own (module:function) keeps its own."""
    if not isinstance(tools.judge, Judge):
        yield tools
        return
    grader = None if tools.grader is None else _grader(tools.judge, store)
    if judge_kind(str(config.judge)) == "function":
        yield replace(tools, grader=grader)
        return
    with Judge(tools.judge.asking, rubric=tools.judge.rubric, store=store, tries=tools.judge.tries) as judge:
        yield replace(tools, judge=judge, grader=grader)


def world_refuses(messages: Sequence[Message], answer: str) -> bool:
    """The oracle's word on a refusal."""
    return oracle.refused(answer)


def open_tools(
    *,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_settings: Mapping[str, Any] | None = None,
    threshold: int = 4,
    guard: str | None = None,
    guard_model: str | None = None,
    guard_threshold: float = 0.5,
    device: str = "cpu",
    versus: Mapping[tuple[str, str], str] | None = None,
) -> Tools:
    """Judge, guard and grader. Errors: ValueError in one sentence where one of them cannot be had."""
    opened: Judging | None = None
    if judge is not None:
        settings = dict(judge_settings or {})
        if judge_model is not None:
            settings["model"] = judge_model
        try:
            opened = load_judge(judge, **settings)
        except TypeError as error:
            raise ValueError(f"judge_settings do not fit judge {judge!r}: {error}") from error
    grader = None
    if isinstance(opened, Judge) and isinstance(opened.asking, Remote | InProcess):
        try:
            grader = _grader(opened, None)
        except ValueError:
            opened.close()
            raise
    return Tools(
        judge=opened,
        grader=grader,
        guard=_guard(guard, guard_model, device),
        refuses=world_refuses if judge is not None and judge_kind(judge) == "oracle" else None,
        threshold=threshold,
        guard_threshold=guard_threshold,
        versus=versus,
    )


def _grader(judge: Judge, store: Store | None) -> Grader:
    """The judge's model, asked other questions than harm: its server must not be held to the schema of that."""
    asking: Any = judge.asking
    if isinstance(asking, Remote):
        asking = Remote(
            asking.client,
            temperature=asking.temperature,
            temperature_again=asking.temperature_again,
            seed=asking.seed,
            max_tokens=asking.max_tokens,
            structured="never",
            rubric_role=asking.rubric_role,
            request=asking.request,
        )
    return Grader(asking, identity={**asking.identity(), **asking.maker()}, store=store, tries=judge.tries)


def _guard(guard: str | None, model: str | None, device: str) -> Any:
    if guard is None:
        return None
    source = world.path("guard") if guard == "world" and model is None else model
    return load_scorer(guard, model=source, device=device)


def names_of(config: EvalConfig, tools: Tools) -> Names:
    """What rows of results call judge and guard: the judge's model, or its kind where it has none."""
    judge = "none"
    if tools.judge is not None:
        identity = tools.judge.identity()
        judge = str(identity.get("model") or identity.get("judge"))
        judge = "oracle" if config.judge == "world" else str(config.judge) if judge == "world:oracle" else judge
    return Names(judge=judge, guard=f"guard {config.guard}", refuses="oracle")


def read_versus(path: str | None) -> dict[tuple[str, str], str] | None:
    """The greedy answers of another run's samples.jsonl. Errors: ValueError that names file and line."""
    if path is None:
        return None
    found = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["decoding"] == "greedy" and row["answer"] is not None:
                found[str(row["task"]), str(row["id"])] = str(row["answer"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no line of a samples.jsonl: {error!r}") from error
    return found
