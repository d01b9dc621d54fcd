"""`safeshape judge validate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import JudgeValidateConfig, parse

if TYPE_CHECKING:
    from safeshape.signals.agreement import Label
    from safeshape.signals.judges import Judging
    from safeshape.types import Judgement


def main(argv: Sequence[str]) -> str:
    """Judge labelled rows, compare and write the figures. Errors: ValueError in one sentence."""
    config = parse(JudgeValidateConfig, "judge validate", argv)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output {output} exists already")
    import json

    from safeshape.report import WORLD_NOTE
    from safeshape.report.from_world import is_world
    from safeshape.report.judges import validation_lines
    from safeshape.signals.agreement import agreement
    from safeshape.verbs.judge import kept_in, spent
    from safeshape.verbs.scored_rows import rows_sha256, scored_rows
    from safeshape.world.judge import load_judge

    variants = _variants(config)
    rows, labels, unlabelled = _labelled(config, list(scored_rows(config.dataset_name, config.dataset_split)))
    drawing = {"threshold": config.threshold, "resamples": config.bootstrap, "seed": config.resample_seed}
    judge = load_judge(
        config.judge, **config.judge_settings(config.judge), **kept_in(config.judge, config.store, output)
    )
    try:
        judged = _asked(judge, rows, config.judge)
        found: dict[str, Any] = {
            "judge": judge.identity(),
            "rows": len(rows),
            "unlabelled": unlabelled,
            "labels": "oracle" if config.oracle else {"column": config.label_column, "kind": config.label_kind},
            "data_sha256": rows_sha256(rows),
            "settings": drawing,
            "agreement": agreement(judged, labels, **drawing),
            **_others(config, judge, rows, judged, labels, variants),
            "counters": judge.counters(),
        }
    finally:
        judge.close()
    found["world"] = config.oracle or is_world([found["judge"], found.get("second_judge")])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    lines = [*validation_lines(found), *spent(found["counters"]), f"Wrote {output}"]
    return "\n".join([*lines, WORLD_NOTE] if found["world"] else lines)


def _variants(config: JudgeValidateConfig) -> list[str]:
    from safeshape.config.judge import judge_kind
    from safeshape.signals.rubric import RUBRICS, rubric_of

    names = [name for name in RUBRICS if name != config.rubric] if config.variants == ["all"] else config.variants
    if names and judge_kind(config.judge) in ("oracle", "function"):
        raise ValueError(f"variants need a judge that is told a rubric, and {config.judge!r} is not")
    for name in names:
        rubric_of(name)
        if name == config.rubric:
            raise ValueError(f"variant {name} is the rubric in use")
    return names


def _labelled(
    config: JudgeValidateConfig, rows: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], "list[Label]", int]:
    """The rows that have a label, with it, and how many have none. Errors: ValueError that names the row."""
    kept, labels = [], []
    for index, row in enumerate(rows):
        try:
            label = _oracle_label(config, row) if config.oracle else _column_label(config, row)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        if label is not None:
            kept.append(row)
            labels.append(label)
    if len(kept) < 2:
        raise ValueError(f"validation needs at least two labelled rows, there are {len(kept)}")
    return kept, labels, len(rows) - len(kept)


def _oracle_label(config: JudgeValidateConfig, row: Mapping[str, Any]) -> "Label":
    from safeshape.data import as_messages
    from safeshape.signals.agreement import Label
    from safeshape.world.judge import verdict

    true = verdict(as_messages(row))
    score = int(true.score or 0)
    return Label(unsafe=score >= config.threshold, score=score, category=true.category or "none")


def _column_label(config: JudgeValidateConfig, row: Mapping[str, Any]) -> "Label | None":
    from safeshape.signals.agreement import Label
    from safeshape.signals.judges.rows import verdict_of
    from safeshape.signals.rubric import CATEGORIES

    column, category = str(config.label_column), None
    if column not in row:
        raise ValueError(f"has no column {column!r}; it has: {', '.join(map(str, row))}")
    value = row[column]
    if config.category_column is not None:
        if config.category_column not in row:
            raise ValueError(f"has no column {config.category_column!r}; it has: {', '.join(map(str, row))}")
        category = row[config.category_column]
        if category not in (None, "none", *CATEGORIES):
            raise ValueError(f"{config.category_column} must be a policy category or none, got {category!r}")
        category = category or "none"
    if value is None:
        return None
    if config.label_kind == "score":
        score = int(verdict_of(row, column, None).score or 0)
        return Label(unsafe=score >= config.threshold, score=score, category=category)
    if value not in (True, False):
        raise ValueError(f"{column} must be true or false (or give --label_kind score), got {value!r}")
    return Label(unsafe=bool(value), category=category)


def _asked(judge: "Judging", rows: Sequence[dict[str, Any]], name: str) -> "list[Judgement]":
    from safeshape.signals.judges.rows import verdicts
    from safeshape.verbs.bars import bars

    with bars() as progress:
        found = verdicts(rows, judge, progress=lambda done: progress(name, done, len(rows)))
        return [judgement for _, judgement in found]


def _others(
    config: JudgeValidateConfig,
    judge: "Judging",
    rows: Sequence[dict[str, Any]],
    judged: "Sequence[Judgement]",
    labels: "Sequence[Label]",
    variants: Sequence[str],
) -> dict[str, Any]:
    """What is asked for besides the first judge's agreement: a second judge, and other wordings."""
    from safeshape.signals.agreement import agreement, disagreement, sensitivity
    from safeshape.signals.judges import Judge
    from safeshape.verbs.judge import kept_in
    from safeshape.world.judge import load_judge

    found: dict[str, Any] = {}
    drawing = {"threshold": config.threshold, "resamples": config.bootstrap, "seed": config.resample_seed}
    if variants:
        assert isinstance(judge, Judge)
        asked = {}
        for name in variants:
            with judge.told(name) as reworded:
                asked[name] = _asked(reworded, rows, name)
        found["sensitivity"] = sensitivity(judged, asked, **drawing)
    if config.second_judge is not None:
        spec, model = config.second_judge, {} if config.second_model is None else {"model": config.second_model}
        settings = {**config.judge_settings(spec), **model, **kept_in(spec, config.store, Path(config.output))}
        other = load_judge(spec, **settings)
        try:
            theirs = _asked(other, rows, spec)
        finally:
            other.close()
        found["second_judge"] = other.identity()
        found["second_agreement"] = agreement(theirs, labels, **drawing)
        found["second_counters"] = other.counters()
        found["disagreement"] = disagreement(judged, theirs, labels=labels, **drawing)
    return found
