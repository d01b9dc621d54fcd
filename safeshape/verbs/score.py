"""`safeshape score`, and the way to its sub-verbs."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safeshape.config import ScoreConfig, parse
from safeshape.verbs.filling import check_output, scored_dataset

if TYPE_CHECKING:
    from safeshape.signals.column import Engine
    from safeshape.signals.scorers import Opened

SUB_VERBS = {
    "antibody": "safeshape.verbs.score_antibody",
    "calibrate": "safeshape.verbs.score_calibrate",
    "view": "safeshape.verbs.score_view",
    "export": "safeshape.verbs.score_export",
}


def main(argv: Sequence[str]) -> str:
    """Score a dataset with a guard and write it, or run a sub-verb. Errors: ValueError in one sentence."""
    if argv and argv[0] in SUB_VERBS:
        return str(importlib.import_module(SUB_VERBS[argv[0]]).main(argv[1:]))
    config = parse(ScoreConfig, "score", argv)
    check_output(config)
    return score(config)


def score(config: ScoreConfig) -> str:
    """Score, write and say what was done."""
    from safeshape import world
    from safeshape.signals.calibration import Calibration
    from safeshape.signals.scorers import open_scorer
    from safeshape.sources import open_source

    source = open_source(config.dataset_name, config.dataset_split)
    given: list[str | None] = list(config.guard_model) or [None] * len(config.guard)
    sources = [world.path("guard") if g == "world" and not m else m for g, m in zip(config.guard, given, strict=True)]
    # A cluster scores with guards of its own; the one here only tells what it is, and needs no GPU for that.
    opened = open_scorer(config if config.engine == "local" else replace(config, device="cpu"), sources)
    calibration = None if config.calibration is None else Calibration.from_file(config.calibration)
    if calibration is not None:
        calibration.check(opened.scorer)
    engine = _engine(config, opened, sources)
    try:
        *done, kept = scored_dataset(
            config, source, engine, maker=opened.maker, scorer=opened.scorer, calibration=calibration
        )
    finally:
        if opened.server is not None:
            opened.server.client.close()
    return "\n".join([*done, *_more(opened), kept])


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


def _more(opened: "Opened") -> list[str]:
    lines = []
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
