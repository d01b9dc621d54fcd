"""What all figures share: colours, names as matplotlib shows them, axes of units, and files that are the same again."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are files; no display is needed
from matplotlib.figure import Figure

from safeshape.report.rows import Pooled, Unit
from safeshape.report.texts import visible

# Okabe and Ito: told apart with every kind of colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx")
DASHES = ("-", "--", "-.", ":")
SCALE = {"percent": 100.0, "harm": 1.0, "number": 1.0}
_LONGEST = 36


def style(place: int) -> dict[str, Any]:
    """Colour, marker and dash of the series at this place; beyond the colours they differ in marker and dash."""
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[(place + place // len(COLORS)) % len(MARKERS)],
        "linestyle": DASHES[place // len(COLORS) % len(DASHES)],
    }


def plain(name: object, longest: int = _LONGEST) -> str:
    """A name as matplotlib shows it: `$` begins its formulas, a leading underscore hides a series."""
    text = f"{name:g}" if isinstance(name, float) else visible(str(name))
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return "\u200b" + text.replace("$", r"\$")


def wrapped(text: str, width: int = 40) -> str:
    """A longer text as matplotlib shows it, in lines of that many letters; what is too long ends in dots."""
    return "\n".join(plain(line, width) for line in textwrap.wrap(text, width, max_lines=4, placeholder=" ..."))


def axis_title(metric: str, unit: Unit) -> str:
    """A metric's name with its unit."""
    return plain(metric.replace("_", " ")) + {"percent": ", %", "harm": ", 1 (safe) to 5", "number": ""}[unit]


def limits(unit: Unit) -> tuple[float, float] | None:
    """The range of an axis, a little wider so that marks at its ends are whole; None for plain numbers."""
    return {"percent": (-4.0, 104.0), "harm": (0.85, 5.15), "number": None}[unit]


def whiskers(cells: Sequence[Pooled], scale: float) -> tuple[list[float], list[list[float]]]:
    """Values and the lengths of their whiskers below and above."""
    values = [scale * cell.value for cell in cells]
    below = [scale * max(cell.value - cell.low, 0.0) for cell in cells]
    return values, [below, [scale * max(cell.high - cell.value, 0.0) for cell in cells]]


def note(figure: Figure, text: str) -> None:
    """A line below a figure."""
    if text:
        figure.supxlabel(text, fontsize="x-small", wrap=True)


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write the figure as .png and .svg with the stem of `path`; the same data gives the same files."""
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "safeshape"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg
