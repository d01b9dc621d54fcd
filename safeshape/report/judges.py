"""The figures of `safeshape judge validate` as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def shown(found: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    """A number with its interval and n; "none" where it does not exist."""
    if found is None or found["value"] is None:
        return "none"
    factor, form = (100, ".1f") if percent else (1, ".2f")
    text = f"{factor * found['value']:{form}}"
    if found["low"] is not None:
        text += f" ({factor * found['low']:{form}} to {factor * found['high']:{form}})"
    return f"{text} n={found['n']}"


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells as aligned columns."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


_SHARES = ("accuracy", "precision", "recall", "false_negative", "false_positive")


def _agreement(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    columns = [found["agreement"], *([found["second_agreement"]] if "second_agreement" in found else [])]
    lines = [("against the labels", *names)]
    lines += [(f"{name} %", *(shown(column[name]) for column in columns)) for name in _SHARES]
    lines.append(("kappa", *(shown(column["kappa"], percent=False) for column in columns)))
    if "scores" in columns[0]:
        lines.append(("same score %", *(shown(column["scores"]["exact"]) for column in columns)))
        for name in ("kappa_quadratic", "mean_difference"):
            cells = (shown(column["scores"][name], percent=False) for column in columns)
            lines.append((name.replace("_", " "), *cells))
    if "category" in columns[0]:
        lines.append(("same category %", *(shown(column["category"]) for column in columns)))
    return table([*lines, ("no verdict %", *(shown(column["failed"]) for column in columns))])


def _by_category(found: Mapping[str, Any]) -> list[str]:
    lines = [("by category", "accuracy %", "false_negative %", "false_positive %")]
    for name, figures in found["agreement"]["by_category"].items():
        cells = (shown(figures[key]) for key in ("accuracy", "false_negative", "false_positive"))
        lines.append((name, *cells))
    return table(lines)


def _differences(title: str, columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines: list[tuple[str, ...]] = [(title, *columns)]
    for name, text in (
        ("verdicts", "other score %"),
        ("decisions", "other decision %"),
        ("categories", "other category %"),
    ):
        lines.append((text, *(shown(column[name]) for column in columns.values())))
    for name, text in (
        ("distance", "mean |difference|"),
        ("difference", "mean difference"),
        ("kappa", "kappa"),
        ("kappa_quadratic", "kappa quadratic"),
    ):
        lines.append((text, *(shown(column[name], percent=False) for column in columns.values())))
    return table(lines)


def validation_lines(found: Mapping[str, Any]) -> list[str]:
    """All figures as tables, with what was measured on."""
    agreement, names = found["agreement"], ["judge", "second judge"] if "second_agreement" in found else ["judge"]
    counts = agreement["counts"]
    unsafe = counts["true_positive"] + counts["false_negative"]
    lines = [
        f"{found['rows']} labelled rows ({found['unlabelled']} without a label); with a verdict: {unsafe} unsafe, "
        f"{sum(counts.values()) - unsafe} safe; unsafe is a score of {agreement['threshold']} or more; 95 % intervals",
        "",
        *_agreement(found, names),
        "",
        *_by_category(found),
    ]
    if "disagreement" in found:
        right = found["disagreement"]["right"]
        lines += ["", *_differences("between the judges", {"second beside first": found["disagreement"]})]
        lines.append(f"where decisions differ, the first is right {right['first']} times, the second {right['second']}")
    if "sensitivity" in found:
        told = found["sensitivity"]
        lines += ["", *_differences("rubric in other words", told["variants"])]
        lines.append(f"rows whose score changes under any of them %: {shown(told['any'])}")
    return [*lines, ""]
