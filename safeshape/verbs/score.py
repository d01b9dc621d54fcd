"""`safeshape score`, and the way to its sub-verbs."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import ScoreConfig, parse

if TYPE_CHECKING:
    from safeshape.signals.column import Engine, Outcome
    from safeshape.signals.scorers import Opened

SUB_VERBS = {
    "calibrate": "safeshape.verbs.score_calibrate",
    "view": "safeshape.verbs.score_view",
    "export": "safeshape.verbs.score_export",
}


def main(argv: Sequence[str]) -> str:
    """Score a dataset with a guard and write it, or run a sub-verb. Errors: ValueError in one sentence."""
    if argv and argv[0] in SUB_VERBS:
        return str(importlib.import_module(SUB_VERBS[argv[0]]).main(argv[1:]))
    config = parse(ScoreConfig, "score", argv)
    if Path(config.output).exists():
        raise ValueError(f"output {config.output} exists already")
    return score(config)


def score(config: ScoreConfig) -> str:
    """Score, write and say what was done."""
    from safeshape import world
    from safeshape.signals.calibration import Calibration
    from safeshape.signals.column import fill, scored_rows
    from safeshape.signals.scorers import open_scorer
    from safeshape.sources import open_source, write_rows
    from safeshape.store import Store
    from safeshape.verbs.bars import bars

    output = Path(config.output)
    source = open_source(config.dataset_name, config.dataset_split)
    given: list[str | None] = list(config.guard_model) or [None] * len(config.guard)
    sources = [world.path("guard") if g == "world" and not m else m for g, m in zip(config.guard, given, strict=True)]
    # A cluster scores with guards of its own; the one here only tells what it is, and needs no GPU for that.
    opened = open_scorer(config if config.engine == "local" else replace(config, device="cpu"), sources)
    calibration = None if config.calibration is None else Calibration.from_file(config.calibration)
    if calibration is not None:
        calibration.check(opened.scorer)
    store_path = config.store or f"{output}.store.sqlite"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Store(store_path) as store, bars() as progress:
            outcome = fill(
                source.rows,
                _engine(config, opened, sources),
                store,
                maker=opened.maker,
                keep_failures=config.on_error == "keep",
                progress=lambda done: progress("scored", done, source.count),
            )
            rows = scored_rows(
                source.rows,
                store,
                maker=opened.maker,
                scorer=opened.scorer,
                outcome=outcome,
                calibration=calibration,
            )
            written = opened.scorer if calibration is None else {**opened.scorer, "calibration": calibration.sha256}
            write_rows(output, rows, None if output.suffix == ".jsonl" else output_schema(source, written))
    finally:
        if opened.server is not None:
            opened.server.client.close()
    return "\n".join([*_summary(config, outcome, opened), f"The scores are kept in {store_path}."])


def _engine(config: ScoreConfig, opened: "Opened", sources: Sequence[str | None]) -> "Engine":
    from functools import partial

    from safeshape.signals.engines import local, on_ray
    from safeshape.signals.scorers import make_scorer

    if config.engine == "local":
        return local(opened.score) if opened.server is None else local(opened.score, block=None)
    return on_ray(
        partial(make_scorer, config, sources),
        actors=config.actors,
        scratch=Path(f"{config.output}.shards"),
        gpus=0.0 if config.device == "cpu" else 1.0,
    )


def output_schema(source: Any, scorer: dict[str, Any]) -> Any:
    """The columns of the output: those of the input and `safety`, whose types are known beforehand."""
    from safeshape.signals.column import safety_type
    from safeshape.sources import schema_of, with_column

    schema = source.schema if source.schema is not None else schema_of(source.rows())
    return with_column(schema, "safety", safety_type(scorer))


def _summary(config: ScoreConfig, outcome: "Outcome", opened: "Opened") -> list[str]:
    lines = [
        f"scored {outcome.rows - outcome.failed} rows ({outcome.scored} now, {outcome.reused} from the store), "
        f"{outcome.unsafe} with p_safe below 0.5; wrote {config.output}"
    ]
    if outcome.failed:
        noun = "row" if outcome.failed == 1 else "rows"
        lines.append(f"{outcome.failed} {noun} failed (first: {outcome.first_failure})")
    if opened.refined is not None and opened.refined.rows:
        report, worst = opened.refined, opened.refined.largest_deviation
        lines.append(
            f"refine: {report.scored} of {report.ends} partial answers were scored; {report.checked} rows were scored "
            f"in full beside, largest deviation {'not known' if worst is None else format(worst, '.3g')}"
        )
    if opened.server is not None:
        done = opened.server.client.counters
        lines.append(
            f"{done.requests} requests, {done.retries} retries, {done.failures} failures, {done.prompt_tokens} prompt "
            f"tokens; {opened.server.bounded} scores were read from a bound"
        )
    return lines
