"""`safeshape eval`, `safeshape eval list` and `safeshape eval theorem`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safeshape.config import EvalConfig, parse

if TYPE_CHECKING:
    from safeshape.evals.answering import Answering
    from safeshape.evals.metrics import Result, Run
    from safeshape.store import Store

SUB_VERBS = {"theorem": "safeshape.verbs.eval_theorem"}
RESULTS = "results.json"


def main(argv: Sequence[str]) -> str:
    """Measure a model, or run a sub-verb. Errors: ValueError in one sentence."""
    if argv and argv[0] in SUB_VERBS:
        return str(importlib.import_module(SUB_VERBS[argv[0]]).main(argv[1:]))
    if argv and argv[0] == "list":
        return listing(argv[1:])
    config = parse(EvalConfig, "eval", argv)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file")
    if (output / RESULTS).exists():  # it is written last: where it is missing, a killed run goes on
        raise ValueError(f"output_dir {output} already holds results ({RESULTS}); choose another folder")
    return evaluate(config, output)


def listing(argv: Sequence[str]) -> str:
    """The suites and the scorers. Errors: ValueError for any flag: it has none."""
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"eval list takes no settings, got {argv[0]!r}")
    if argv:
        return "usage: safeshape eval list\n\nThe suites and scorers that `safeshape eval` knows by name."
    from safeshape.evals.scorers import SCORERS
    from safeshape.evals.suites import SUITES
    from safeshape.verbs.eval_output import aligned

    rows = [("suite", "Hub", "asked", "licence", "source")]
    rows += [
        (name, suite.hub[0].id if suite.hub else f"{name}=FILE", suite.field, suite.licence, suite.source)
        for name, suite in SUITES.items()
    ]
    scorers = [(name, scorer.metric, scorer.by) for name, scorer in SCORERS.items()]
    lines = [*aligned(rows), "", *aligned([("scorer", "metric", "by"), *scorers])]
    return "\n".join(
        [*lines, "", "Also: world, world:TASK, lm_eval:TASK, and your own tasks and scorers as module:function."]
    )


def evaluate(config: EvalConfig, output: Path) -> str:
    """Ask, judge, write and say what was found. Whatever can be refused is refused before anything is written."""
    from safeshape.evals.measuring import Plan, ask_all, judge_all
    from safeshape.evals.metrics import Run, results
    from safeshape.models import Sampling
    from safeshape.verbs import eval_output, eval_setup
    from safeshape.verbs.bars import bars

    tasks = eval_setup.tasks_of(config)
    harness = eval_setup.harness_tasks(config)
    scorers = eval_setup.scorers_for(config, tasks)
    plan = Plan(
        greedy=config.greedy,
        samples=config.samples,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )
    run = Run(
        attack=config.attack,
        defence=config.defence or eval_setup.made_by(config)[1],
        model=config.name or eval_setup.made_by(config)[0],
        seed=config.seed,
        threshold=config.judge_threshold,
    )
    with (
        eval_setup.opened_tools(config, tasks, scorers) as opened,
        eval_setup.opened_model(config) as model,
        bars() as progress,
        eval_setup.opened_store(config, output) as store,
        eval_setup.keeping(config, opened, store) as tools,
    ):
        asked = ask_all(model, tasks, plan, store, progress)
        measured = judge_all(asked, scorers, tools, plan, eval_setup.names_of(config, tools), progress)
        found = [one for each in measured for one in results(each, run)]
        if harness:
            found += _harness(config, model, harness, run, store)
        judge = None if tools.judge is None else {"identity": tools.judge.identity(), "did": tools.judge.counters()}
        done = eval_output.Done(
            config=config,
            model=model.identity(),
            judge=judge,
            tasks=tasks,
            asked=asked,
            measured=measured,
            found=found,
        )
    eval_output.write(output, done)
    return eval_output.told(output, done)


def _harness(
    config: EvalConfig, model: "Answering", names: Sequence[str], run: "Run", store: "Store"
) -> list["Result"]:
    from safeshape.evals.answering import LocalModel
    from safeshape.evals.lm_eval_bridge import run_lm_eval
    from safeshape.verbs.eval_setup import on_world

    assert isinstance(model, LocalModel)
    return run_lm_eval(
        model,
        names,
        run,
        keep=store.path,
        include_path=config.lm_eval_tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        chat_template=config.lm_eval_chat_template,
        world=on_world(config),
    )
