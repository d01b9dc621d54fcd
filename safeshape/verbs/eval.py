"""`safeshape eval`, `safeshape eval list` and `safeshape eval theorem`."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import EvalConfig, parse

if TYPE_CHECKING:
    from safeshape.evals import Measured, Task
    from safeshape.evals.answering import Answering
    from safeshape.evals.measuring import Asked
    from safeshape.evals.metrics import Result
    from safeshape.evals.scorers import Tools

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
    for name in (RESULTS, "samples.jsonl"):
        if (output / name).exists():
            raise ValueError(f"output_dir {output} already holds results ({name}); choose another folder")
    return evaluate(config, output)


def listing(argv: Sequence[str]) -> str:
    """The suites and the scorers. Errors: ValueError for any flag: it has none."""
    if argv:
        raise ValueError(f"eval list takes no settings, got {argv[0]!r}")
    from safeshape.evals.scorers import SCORERS
    from safeshape.evals.suites import SUITES

    rows = [("suite", "Hub", "asked", "licence", "source")]
    rows += [
        (name, suite.hub[0].id if suite.hub else f"{name}=FILE", suite.field, suite.licence, suite.source)
        for name, suite in SUITES.items()
    ]
    lines = [*_aligned(rows), "", *_aligned([("scorer", "metric", "by"), *_scorers(SCORERS)])]
    return "\n".join(
        [*lines, "", "Also: world, world:TASK, lm_eval:TASK, and your own tasks and scorers as module:function."]
    )


def _scorers(table: Any) -> list[tuple[str, str, str]]:
    return [(name, scorer.metric, scorer.by) for name, scorer in table.items()]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def evaluate(config: EvalConfig, output: Path) -> str:
    """Ask, judge, write and say what was found."""
    from safeshape.evals.measuring import Plan, ask_all, judge_all
    from safeshape.evals.metrics import Run, results
    from safeshape.models import Sampling
    from safeshape.store import Store
    from safeshape.verbs import eval_setup as setup
    from safeshape.verbs.bars import bars

    tasks = setup.tasks_of(config)
    harness = [spec.removeprefix(setup.LM_EVAL) for spec in config.tasks if spec.startswith(setup.LM_EVAL)]
    if harness and config.server is not None:
        raise ValueError("lm_eval tasks need the model in this process; leave out --server")
    scorers = setup.scorers_for(config, tasks)
    versus = setup.read_versus(config.versus)
    _reachable(config)
    model = setup.open_model(config)
    plan = Plan(
        greedy=config.greedy,
        samples=config.samples,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )
    run = Run(
        attack=config.attack,
        defence=config.defence,
        model=config.name or model.name,
        seed=config.seed,
        threshold=config.judge_threshold,
    )
    output.mkdir(parents=True, exist_ok=True)
    with bars() as progress, Store(config.store or output / "eval.sqlite") as store:
        tools = _tools(config, store, versus)
        try:
            asked = ask_all(model, tasks, plan, store, progress)
            measured = judge_all(asked, scorers, tools, plan, setup.names_of(config, tools), progress)
            judge = None if tools.judge is None else {"identity": tools.judge.identity(), "did": tools.judge.counters()}
        finally:
            if tools.judge is not None:
                tools.judge.close()
        found = [one for each in measured for one in results(each, run)]
        if harness:
            found += _harness(config, model, harness, run)
    _write(output, config, model, tasks, asked, measured, found, judge)
    return _told(config, tasks, asked, measured, found, output)


def _tools(config: EvalConfig, store: Any, versus: Any) -> "Tools":
    from safeshape.verbs.eval_setup import open_tools

    return open_tools(
        judge=config.judge,
        judge_model=config.judge_model,
        judge_settings=config.judge_settings if isinstance(config.judge_settings, dict) else None,
        threshold=config.judge_threshold,
        guard=config.guard,
        guard_model=config.guard_model,
        guard_threshold=config.guard_threshold,
        device=config.device,
        store=store,
        versus=versus,
    )


def _reachable(config: EvalConfig) -> None:
    """Ask a judge's server for a greeting before anything is written or loaded. Errors: ValueError."""
    from safeshape.config.judge import judge_kind

    if config.judge is None or judge_kind(config.judge) != "server":
        return
    from safeshape.signals.judges import Judge
    from safeshape.verbs.eval_setup import open_tools

    tools = open_tools(
        judge=config.judge,
        judge_model=config.judge_model,
        judge_settings=config.judge_settings if isinstance(config.judge_settings, dict) else None,
    )
    assert isinstance(tools.judge, Judge)
    try:
        tools.judge.maker()
    finally:
        tools.judge.close()


def _harness(config: EvalConfig, model: "Answering", names: list[str], run: Any) -> list["Result"]:
    from safeshape.evals.answering import LocalModel
    from safeshape.evals.lm_eval_bridge import run_lm_eval

    assert isinstance(model, LocalModel)
    return run_lm_eval(
        model.model,
        model.tokenizer,
        names,
        run,
        include_path=config.lm_eval_tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
        chat_template=config.lm_eval_chat_template,
        world=str(config.model_name_or_path).startswith("world:"),
    )


def _write(
    output: Path,
    config: EvalConfig,
    model: "Answering",
    tasks: Sequence["Task"],
    asked: Sequence["Asked"],
    measured: Sequence["Measured"],
    found: Sequence["Result"],
    judge: Any,
) -> None:
    """results.json last: where it stands, the run is whole."""
    import safeshape
    from safeshape.report.rows import OUTCOMES, PromptOutcomes, write_outcomes
    from safeshape.report.tables import write_results

    names = ("attack", "defence", "model", "seed", "metric", "judge", "settings")
    outcomes = [
        PromptOutcomes(**{name: vars(one.row)[name] for name in names}, prompts=one.prompts, counts=one.counts)
        for one in found
        if one.counts and one.row.category is None
    ]
    write_outcomes(output / OUTCOMES, outcomes)
    content = {
        "version": safeshape.__version__,
        "config": asdict(config),
        "definitions": definitions(config),
        "model": model.identity(),
        "judge": judge,
        "tasks": [
            {"name": t.name, "kind": t.kind, "prompts": len(t.prompts), "notes": list(t.notes), "world": t.world}
            for t in tasks
        ],
        "answers": [
            {
                "task": one.task.name,
                "decoding": one.decoding,
                "n": len(one.answers),
                "reused": one.reused,
                "failed": sum(a.text is None for a in one.answers),
                "first_failure": next((a.error for a in one.answers if a.text is None), None),
            }
            for one in asked
        ],
        "verdicts": [
            {
                "task": one.task.name,
                "decoding": one.decoding,
                "scorer": one.scorer,
                "n": sum(v.value is not None for v in one.verdicts),
                "failed": sum(v.value is None for v in one.verdicts),
                "first_failure": next((v.error for v in one.verdicts if v.value is None), None),
            }
            for one in measured
        ],
        "numbers": [{**asdict(one.row), "failed": one.failed} for one in found],
    }
    (output / "eval.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    if config.save_answers:
        _write_samples(output / "samples.jsonl", measured)
    write_results(output / RESULTS, [one.row for one in found])


def _write_samples(path: Path, measured: Sequence["Measured"]) -> None:
    """Prompts, answers and verdicts. Escaped, so that no page or terminal that shows a line acts on it."""
    rows: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    for one in measured:
        for answer, verdict in zip(one.answers, one.verdicts, strict=True):
            row = rows.setdefault(
                (one.task.name, one.decoding, answer.index, answer.sample),
                {
                    "task": one.task.name,
                    "decoding": one.decoding,
                    "id": one.task.ids[answer.index] if one.task.ids else str(answer.index),
                    "sample": answer.sample,
                    "category": one.task.categories[answer.index] if one.task.categories else None,
                    "messages": [dict(m) for m in one.task.prompts[answer.index]],
                    "answer": answer.text,
                    "error": answer.error,
                    "verdicts": {},
                },
            )
            row["verdicts"][one.scorer] = asdict(verdict)
    with path.open("w", encoding="ascii") as lines:
        for row in rows.values():
            text = json.dumps(row, ensure_ascii=True)
            for sign in "<>&":
                text = text.replace(sign, f"\\u{ord(sign):04x}")
            lines.write(text.replace("\x7f", "\\u007f") + "\n")


def definitions(config: EvalConfig) -> dict[str, str]:
    """What the numbers of this run mean."""
    return {
        "attack_success": f"share of harmful requests whose answer the judge scores {config.judge_threshold} or more "
        "of 5; several attempts at a request count once, as success when one succeeds",
        "attack_success_sampled": "the same over all sampled answers",
        "attack_success_any_of_n": "share of requests with at least one success among n samples",
        "harmfulness": "mean score of the judge, 1 (safe) to 5 (direct fulfilment)",
        "attack_success_guard": f"share of answers whose p_safe by the guard is below {config.guard_threshold:g}",
        "over_refusal": "share of harmless requests that are refused or only partly served",
        "refusal": "share of harmful requests that are refused or only partly served",
        "declined": "share of requests to be declined for other reasons that are declined",
        "refusal_strings": "share of answers that begin as refusals do; a rule, beside the judge's word",
        "refusal_style": "shares of hard, soft, redirecting and no refusal; rules, beside the judge's word",
        "accuracy": "share of right answers by the task's own comparison",
        "interval": "95 %: Wilson for rates over requests, bootstrap over requests for all else",
        "n": "requests, or answers where sampled, that have a verdict; those without are counted as failed",
    }


def _told(
    config: EvalConfig,
    tasks: Sequence["Task"],
    asked: Sequence["Asked"],
    measured: Sequence["Measured"],
    found: Sequence["Result"],
    output: Path,
) -> str:
    from safeshape.report.tables import WORLD_NOTE

    lines = _table([one for one in found if one.row.category is None])
    per_category = [one for one in found if one.row.category is not None and one.row.metric == "harmfulness"]
    if per_category:
        lines += ["", "Harmfulness by category:", *_table(per_category)]
    if any(one.task.kind == "harmful" for one in asked):
        lines += ["", f"Attack success: {definitions(config)['attack_success']}."]
    reused, total = sum(one.reused for one in asked), sum(len(one.answers) for one in asked)
    if total:
        lines.append(f"{total} answers, {reused} of them from the store.")
    lines += [note[0].upper() + note[1:] + "." for note in dict.fromkeys(note for task in tasks for note in task.notes)]
    for one in measured:
        failures = [v.error for v in one.verdicts if v.value is None]
        if failures:
            lines.append(
                f"{one.task.name}, {one.decoding}: {len(failures)} of {len(one.verdicts)} answers have no verdict of "
                f"{one.scorer} and are left out (first: {failures[0]})."
            )
    if any(one.row.world for one in found):
        lines.append(WORLD_NOTE)
    lines.append(
        f"Wrote {output}/{RESULTS}, outcomes.json, eval.json" + (", samples.jsonl" if config.save_answers else "")
    )
    return "\n".join(lines)


def _table(found: Sequence["Result"]) -> list[str]:
    rows = [("dataset", "metric", "category", "value", "95 % interval", "n", "failed", "judge")]
    for one in found:
        row, scale = one.row, one.row.metric.startswith(("harmfulness", "strongreject"))
        numbers = [f"{x:.2f}" if scale else f"{100 * x:.1f} %" for x in (row.value, row.low, row.high)]
        rows.append(
            (
                str(row.settings.get("dataset", "")),
                row.metric,
                row.category or "",
                numbers[0],
                f"{numbers[1]} to {numbers[2]}",
                str(row.n),
                str(one.failed),
                row.judge,
            )
        )
    return _aligned(rows)
