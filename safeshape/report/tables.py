"""Rows of results as JSON and as tables, and what every report says about its numbers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safeshape.types import Row

WORLD_NOTE = (
    "Measured on the embedded synthetic world: tiny models, an invented language, placeholder acts. "
    "It is a test bench and says nothing about real models."
)
METRIC_NOTE = (
    "Percent of held-out prompts, with 95 % Wilson interval and n. Attack success and over-refusal should be low, "
    "task accuracy (what the user wants learned) and skill accuracy (what the model could do before) high."
)


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def cell(row: Row) -> tuple[str, str]:
    """A rate in percent and its interval, as two short texts."""
    return f"{100 * row.value:.1f}", f"{100 * row.low:.1f}-{100 * row.high:.1f}"


def table(rows: Sequence[Row]) -> tuple[list[str], dict[str, dict[str, Row]]]:
    """The metrics in order of appearance, and the rows by defence and metric."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.defence, {})[row.metric] = row
    return metrics, found


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as Markdown: percent, 95 % interval and n in every cell."""
    metrics, found = table(rows)
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in metrics) + " |", "|---|" + "---|" * len(metrics)]
    for defence, cells in found.items():
        shown = [f"{cell(cells[m])[0]} ({cell(cells[m])[1]}, n={cells[m].n})" for m in metrics]
        lines.append(f"| {defence} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal, in aligned columns."""
    metrics, found = table(rows)
    head = ["", *(name.replace("_", " ") for name in metrics)]
    lines = [[d, *(f"{cell(c[m])[0]} ({cell(c[m])[1]}, n={c[m].n})" for m in metrics)] for d, c in found.items()]
    widths = [max(len(line[place]) for line in [head, *lines]) for place in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    )
