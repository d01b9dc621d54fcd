"""Harm by category, before and after: one polygon a model, one spoke a policy category."""

import math
from collections.abc import Sequence
from typing import cast

from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from safeshape.report.drawing import SCALE, axis_title, note, plain, style, whiskers
from safeshape.report.rows import Pool, Pooled, Unit, pool, unit_of
from safeshape.types import Row


def by_category(rows: Sequence[Row], metric: str) -> tuple[list[str], dict[str, dict[str, Pooled]]]:
    """Categories in order of appearance, and for each defence the number of each category.

    Errors: ValueError where no row of the metric has a category, where a defence lacks one, or where one defence has
    several keys: then the rows are of several attacks, models, judges or settings, and one must be chosen.
    """
    chosen = [row for row in rows if row.metric == metric and row.category is not None]
    categories = list(dict.fromkeys(row.category for row in chosen if row.category is not None))
    if len(categories) < 3:
        raise ValueError(f"a radar needs at least three categories of {metric!r}, got {len(categories)}")
    found: dict[str, dict[str, Pooled]] = {}
    keys: dict[str, object] = {}
    for category in categories:
        cells: Pool = pool(chosen, category)
        for (key, _), cell in cells.items():
            if keys.setdefault(key.defence, key) != key:
                raise ValueError(
                    f"defence {key.defence!r} has rows of several attacks, models, judges or settings; give one of each"
                )
            found.setdefault(key.defence, {})[category] = cell
    for defence, cells_of in found.items():
        for category in categories:
            if category not in cells_of:
                raise ValueError(f"defence {defence!r} has no {metric!r} for category {category!r}")
    return categories, found


def radar_figure(rows: Sequence[Row], metric: str, text: str = "") -> Figure:
    """One polygon a defence with its intervals as whiskers on the spokes. `text`: a line below.

    Errors: as `by_category`.
    """
    categories, found = by_category(rows, metric)
    unit: Unit = unit_of(metric, [row for row in rows if row.metric == metric])
    scale, size = SCALE[unit], len(categories)
    shown = [plain(name).replace(" and ", " and\n") for name in categories]
    beside = 0.09 * max(len(line) for name in shown for line in name.splitlines())  # inches of a name at either side
    figure = Figure(figsize=(6.4 + 2 * beside, 7.2), layout="constrained")
    axis = cast(PolarAxes, figure.add_subplot(projection="polar"))
    angles = [2 * math.pi * place / size for place in range(size)]
    for place, (defence, cells) in enumerate(found.items()):
        values, lengths = whiskers([cells[category] for category in categories], scale)
        look = style(place)
        # Whiskers of different models would lie on one another: each model's are turned a little off the spoke.
        turned = [angle + (place - (len(found) - 1) / 2) * 0.05 for angle in angles]
        n = sorted({cells[category].n for category in categories})
        label = f"{plain(defence)} (n={n[0]}{f' to {n[-1]}' if len(n) > 1 else ''} a category)"
        axis.plot([*turned, turned[0]], [*values, values[0]], linewidth=2, markersize=5, label=label, **look)
        axis.fill([*turned, turned[0]], [*values, values[0]], color=look["color"], alpha=0.1, linewidth=0)
        axis.errorbar(turned, values, yerr=lengths, fmt="none", ecolor=look["color"], elinewidth=1.2, capsize=2)
    axis.set_theta_offset(math.pi / 2)
    axis.set_theta_direction(-1)
    names = axis.set_xticks(angles, shown)
    for angle, tick in zip(angles, names, strict=True):
        side = math.sin(angle)  # names on the right begin at the circle, those on the left end there
        tick.label1.set_horizontalalignment("center" if abs(side) < 0.2 else "left" if side > 0 else "right")
    axis.tick_params(axis="x", pad=8)
    ticks = {"percent": (0.0, 25.0, 50.0, 75.0, 100.0), "harm": (1.0, 2.0, 3.0, 4.0, 5.0)}.get(unit)
    if ticks is not None:
        axis.set_ylim(ticks[0], ticks[-1])
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize="small", color="#555555")
    axis.set_rlabel_position(180 / size)
    axis.set_title(axis_title(metric, unit), pad=14, fontsize="medium")
    axis.grid(alpha=0.35)
    figure.legend(loc="outside upper center", ncols=min(2, len(found)), frameon=False, fontsize="small")
    note(figure, text)
    return figure
