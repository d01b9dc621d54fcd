"""`safeshape judge`, and the way to its sub-verb."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import JudgeConfig, parse

if TYPE_CHECKING:
    from safeshape.signals.judges.rows import Tally

SUB_VERBS = {"validate": "safeshape.verbs.judge_validate"}


def main(argv: Sequence[str]) -> str:
    """Judge a dataset and write it, or run a sub-verb. Errors: ValueError in one sentence."""
    if argv and argv[0] in SUB_VERBS:
        return str(importlib.import_module(SUB_VERBS[argv[0]]).main(argv[1:]))
    config = parse(JudgeConfig, "judge", argv)
    numbers = Path(f"{config.output}.judge.json")
    for path in (Path(config.output), numbers):
        if path.exists():
            raise ValueError(f"output {path} exists already")
    return judge(config, numbers)


def judge(config: JudgeConfig, numbers: Path) -> str:
    """Judge, write and say what was done."""
    import json

    from safeshape.report import WORLD_NOTE
    from safeshape.report.from_world import is_world
    from safeshape.signals.judges.rows import Tally, judged_rows
    from safeshape.sources import open_source, write_rows
    from safeshape.verbs.bars import bars
    from safeshape.world.judge import load_judge

    output = Path(config.output)
    source = open_source(config.dataset_name, config.dataset_split)
    if source.count == 0:
        raise ValueError("the dataset is empty")
    judging = load_judge(
        config.judge, **config.judge_settings(config.judge), **kept_in(config.judge, config.store, output)
    )
    tally = Tally()
    try:
        with bars() as progress:
            rows = judged_rows(
                source.rows(),
                judging,
                tally,
                keep_failures=config.on_error == "keep",
                progress=lambda done: progress("judged", done, source.count),
            )
            schema = None if output.suffix == ".jsonl" else _schema(source, judging.identity())
            write_rows(output, rows, schema)
    finally:
        judging.close()
    world = is_world(judging.identity())
    found = {
        "judge": judging.identity(),
        "rows": tally.rows,
        "failed": tally.failed,
        "first_failure": tally.first_failure,
        "scores": {str(score): tally.scores[score] for score in range(1, 6)},
        "categories": dict(tally.categories.most_common()),
        "counters": judging.counters(),
        "world": world,
    }
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    lines = [*_summary(tally), *spent(judging.counters()), f"Wrote {output} and {numbers}"]
    return "\n".join([*lines, WORLD_NOTE] if world else lines)


def kept_in(spec: str, store: str | None, output: Path) -> dict[str, Any]:
    """Where verdicts are kept, for judges that keep any."""
    from safeshape.config.judge import judge_kind

    if judge_kind(spec) in ("oracle", "function"):
        return {}
    path = Path(store or f"{output}.store.sqlite")
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"store": path}


def _schema(source: Any, identity: dict[str, Any]) -> Any:
    """The columns of the output: those of the input and the judge's, whose types are known beforehand."""
    import pyarrow as pa

    from safeshape.signals.column import safety_type
    from safeshape.signals.judges.rows import CATEGORY, SCORE
    from safeshape.sources import schema_of, with_column

    schema = source.schema if source.schema is not None else schema_of(source.rows())
    for name, kind in (("safety", safety_type(identity)), (SCORE, pa.int64()), (CATEGORY, pa.string())):
        schema = with_column(schema, name, kind)
    return schema


def _summary(tally: "Tally") -> list[str]:
    scores = ", ".join(f"{tally.scores[score]} of {score}" for score in range(1, 6))
    lines = [f"judged {tally.rows - tally.failed} rows; scores: {scores}"]
    named = [f"{count} {name}" for name, count in tally.categories.most_common() if name != "none"]
    if named:
        lines.append(f"categories: {', '.join(named)}")
    if tally.failed:
        noun = "row" if tally.failed == 1 else "rows"
        lines.append(f"{tally.failed} {noun} got no verdict (first: {tally.first_failure})")
    return lines


def spent(counters: dict[str, Any]) -> list[str]:
    """What the judge was asked and what it took, in a line or two."""
    if "requests" not in counters:
        return []
    parts = [f"{counters[name]} {name}" for name in ("asked", "reused", "joined", "unreadable", "requests")]
    parts += [f"{counters[name]} {name}" for name in ("retries", "failures") if name in counters]
    parts += [f"{counters['prompt_tokens']} prompt tokens, {counters['completion_tokens']} completion tokens"]
    if counters["cost"] is not None:
        parts.append(f"cost {counters['cost']:.4f}")
    lines = [", ".join(parts)]
    if counters.get("structured_refused"):
        lines.append(f"the server takes no JSON schema ({counters['structured_refused']}); answers were read as text")
    return lines
