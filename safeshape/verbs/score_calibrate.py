"""`safeshape score calibrate`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safeshape.config import ScoreCalibrateConfig, parse


def main(argv: Sequence[str]) -> str:
    """Fit a calibration, measure it on held-out rows and write it. Errors: ValueError in one sentence."""
    config = parse(ScoreCalibrateConfig, "score calibrate", argv)
    output = Path(config.output)
    picture = output.with_suffix(".png")
    for path in (output, picture):
        if path.exists():
            raise ValueError(f"output {path} exists already")
    from safeshape.report import WORLD_NOTE, reliability_figure
    from safeshape.report.from_world import is_world
    from safeshape.signals.calibration import identity
    from safeshape.signals.reliability import calibrated_items, fit, labelled, measure, split
    from safeshape.verbs.scored_rows import rows_sha256, scored_rows

    rows = list(scored_rows(config.dataset_name, config.dataset_split))
    items, left_out = labelled(rows, label_column=config.label_column, span_labels=config.span_labels)
    fitted_on, held_out = split(items, share=config.calibration_share, seed=config.seed)
    scorers = [identity(item.score.scorer) for item in items]
    for scorer in scorers:
        if scorer != scorers[0]:
            raise ValueError(f"the rows were scored by different scorers: {scorers[0]} and {scorer}")
        if "calibration" in scorer:
            raise ValueError("the scores are calibrated already; calibrate what the guard itself gave")
    calibration, has_temperature = fit(
        fitted_on, alpha=config.alpha, by=config.by, scorer=scorers[0], data_sha256=rows_sha256(rows)
    )
    settings: dict[str, Any] = {"by": config.by, "positions": config.positions, "seed": config.seed}
    before = measure(held_out, flag=lambda p_safe: p_safe < 0.5, **settings)
    after = measure(calibrated_items(held_out, calibration), flag=calibration.flags, **settings)
    world = is_world(scorers[0])
    figures = {
        "held_out": len(held_out),
        **left_out,
        "positions": config.positions,
        "temperature_fitted": has_temperature,
        "world": world,
        "before": {"flagged": "p_safe < 0.5", **before},
        "after": {"flagged": "calibrated p_safe <= threshold", **after},
        "guarantee": calibration.guarantee(),
    }
    kind = "spans" if config.span_labels else "answers"
    figure = reliability_figure({"before": before[kind], "after": after[kind]}, WORLD_NOTE if world else "")
    output.parent.mkdir(parents=True, exist_ok=True)
    calibration = replace(calibration, figures=figures)
    calibration.save(output)
    figure.savefig(picture, dpi=150)
    lines = [
        f"{len(rows)} rows: {calibration.n} to fit on ({calibration.n_unsafe} unsafe), {len(held_out)} held out, "
        f"{left_out['unlabelled']} without a label, {left_out['failed']} that the scorer failed on",
        f"temperature {calibration.temperature:.4g}, threshold {calibration.threshold:.4g}",
        *([] if has_temperature else ["The labels are perfectly separated at 0.5, so the temperature is left at 1"]),
        "",
        *_table(before, after, kind),
        "",
        calibration.guarantee(),
        *([WORLD_NOTE] if world else []),
        f"Wrote {output} and {picture}",
    ]
    return "\n".join(lines)


def _table(before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> list[str]:
    """Figures before and after on held-out rows, then the error rates along the answer (the first twelve places)."""
    lines: list[tuple[str, ...]] = [("held-out rows", "before (0.5)", "after (threshold)")]
    for name in ("auroc", "ece"):
        lines.append((f"{name} of {kind}", *(_shown(found[kind][name], 1, ".3f") for found in (before, after))))
    for name in ("false_negative", "false_positive"):
        lines.append((f"{name} %", *(_shown(found["rates"][name], 100, ".1f") for found in (before, after))))
    for name in ("false_negative", "false_positive"):
        for old, new in list(zip(before["positions"], after["positions"], strict=True))[:12]:
            place = f"{name} % at {old['position']}"
            lines.append((place, _shown(old[name], 100, ".1f"), _shown(new[name], 100, ".1f")))
    widths = [max(len(line[place]) for line in lines) for place in range(3)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _shown(found: Mapping[str, Any], factor: float, form: str) -> str:
    if found["value"] is None:
        return "none"
    number = f"{factor * found['value']:{form}}"
    if found["low"] is not None:
        number += f" ({factor * found['low']:{form}}-{factor * found['high']:{form}})"
    return number + (f" n={found['n']}" if "n" in found else "")
