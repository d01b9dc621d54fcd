"""A metric against a setting (harmful share, learning rate, chunk size, KL weight, ...), safety against utility, and
panels by model, guard or data set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safeshape.report.drawing import SCALE, axis_title, limits, note, plain, style, whiskers
from safeshape.report.grid import Grid, part_of
from safeshape.report.rows import Key, Pooled

MEASURED = ("dataset", "decoding", "threshold")  # settings of `safeshape eval` that say how a number was measured
LOGARITHMIC = ("learning_rate", "chunk", "kl", "epsilon")
_NAMES = {
    "harmful_share": "harmful share of the data, %",
    "learning_rate": "learning rate",
    "chunk": "chunk size",
    "kl": "weight of the KL term",
}
_COLUMNS = 3


def varying(grid: Grid) -> list[str]:
    """The settings that have at least two different numbers, and so can be an axis."""
    found = dict.fromkeys(name for key in grid.keys for name, _ in key.settings)
    numbers = {
        name: {value for key in grid.keys for part, value in key.settings if part == name and _is_number(value)}
        for name in found
    }
    return [name for name, values in numbers.items() if len(values) > 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _rest(key: Key, without: Sequence[str]) -> str:
    """What else a key says, as a short text, so that lines which differ in it are told apart."""
    parts = [f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
             for name, value in key.settings if name not in without]  # fmt: skip
    return ", ".join(parts)


def curve_figure(grid: Grid, metric: str, setting: str, *, logarithmic: bool | None = None, text: str = "") -> Figure:
    """The metric against the setting: a line a defence, whiskers for intervals, a panel for each attack and model.

    A key without the setting (an untouched model) is a horizontal dotted line. `logarithmic`: None for learning rate,
    chunk and KL weight where all are above 0.
    Errors: ValueError when fewer than two values of the setting were measured.
    """
    points = [key for key in grid.keys if _is_number(dict(key.settings).get(setting)) and (key, metric) in grid.cells]
    values = sorted({float(dict(key.settings)[setting]) for key in points})
    if len(values) < 2:
        raise ValueError(f"a curve of {metric!r} needs at least two values of {setting!r}, got {len(values)}")
    if logarithmic is None:
        logarithmic = setting in LOGARITHMIC and min(values) > 0
    panels = list(dict.fromkeys((key.attack, key.model) for key in points))
    flat = [key for key in grid.keys if setting not in dict(key.settings) and (key, metric) in grid.cells]
    names = list(dict.fromkeys(_series(key, setting) for key in (*points, *flat)))
    figure, axes = _panels(len(panels))
    unit, stretch = grid.units[metric], 100.0 if setting == "harmful_share" else 1.0
    for axis, (attack, model) in zip(axes, panels, strict=True):
        for key in flat:
            if key.model == model and key.attack in (attack, "none"):
                look = {**style(names.index(_series(key, setting))), "linestyle": ":", "marker": ""}
                axis.axhline(SCALE[unit] * grid.cells[key, metric].value, label=_series(key, setting), **look)
        lines: dict[str, list[Key]] = {}
        for key in points:
            if (key.attack, key.model) == (attack, model):
                lines.setdefault(_series(key, setting), []).append(key)
        for name, keys in lines.items():
            keys.sort(key=lambda key: float(dict(key.settings)[setting]))
            y, lengths = whiskers([grid.cells[key, metric] for key in keys], SCALE[unit])
            x = [stretch * float(dict(key.settings)[setting]) for key in keys]
            axis.errorbar(x, y, yerr=lengths, label=name, capsize=3, linewidth=1.8, **style(names.index(name)))
        axis.set_title(_title(attack, model, panels), fontsize="medium")
        axis.set_xlabel(_NAMES.get(setting, plain(setting.replace("_", " "))))
        if logarithmic:
            axis.set_xscale("log")
        if setting == "chunk":
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.minorticks_off()
        _finish(axis, limits(unit))
    axes[0].set_ylabel(axis_title(metric, unit))
    _legend(figure, axes, text)
    return figure


def _series(key: Key, setting: str) -> str:
    rest = _rest(key, [setting])
    return plain(f"{key.defence} ({rest})" if rest else key.defence)


def _title(attack: str, model: str, panels: Sequence[tuple[str, str]]) -> str:
    attacks, models = {a for a, _ in panels}, {m for _, m in panels}
    parts = ([attack] if len(attacks) > 1 or len(models) == 1 else []) + ([model] if len(models) > 1 else [])
    return "\n".join(plain(part) for part in parts)


def scatter_figure(grid: Grid, safety: str, utility: str, text: str = "") -> Figure:
    """Safety against utility: a mark a model, whiskers both ways; the best corner is the lower right one.

    `safety`: a metric that should be low, `utility`: one that should be high; the two may be of different data sets.
    Panels by attack, model and data sets.
    Errors: ValueError when no model has both.
    """
    pairs = _pairs(grid, safety, utility)
    if not pairs:
        raise ValueError(f"no line of the table has both {safety!r} and {utility!r}")
    every = list(dict.fromkeys((low.attack, low.model, _sets(low, high)) for low, high in pairs))
    # What was not attacked is the state before, and stands in the panels of the attacks on the same model.
    attacked = {(model, sets) for attack, model, sets in every if attack != "none"}
    panels = [(attack, *rest) for attack, *rest in every if attack != "none" or tuple(rest) not in attacked]
    names = list(dict.fromkeys(low.defence for low, _ in pairs))
    figure, axes = _panels(len(panels))
    for axis, (attack, model, sets) in zip(axes, panels, strict=True):
        for low, high in pairs:
            if (low.model, _sets(low, high)) == (model, sets) and low.attack in (attack, "none"):
                x, across = whiskers([grid.cells[high, utility]], SCALE[grid.units[utility]])
                y, along = whiskers([grid.cells[low, safety]], SCALE[grid.units[safety]])
                look = {**style(names.index(low.defence)), "linestyle": "", "markersize": 8, "capsize": 3}
                axis.errorbar(x, y, xerr=across, yerr=along, label=plain(low.defence), **look)
        title = _title(attack, model, [(a, m) for a, m, _ in panels])
        axis.set_title("\n".join(part for part in (title, plain(sets)) if part), fontsize="medium")
        axis.set_xlabel(axis_title(utility, grid.units[utility]))
        _finish(axis, limits(grid.units[safety]), limits(grid.units[utility]))
    axes[0].set_ylabel(axis_title(safety, grid.units[safety]))
    _legend(figure, axes, text)
    return figure


def _pairs(grid: Grid, safety: str, utility: str) -> list[tuple[Key, Key]]:
    """Lines with the safety metric and lines with the utility metric of one model, whatever they were measured on."""
    low = [key for key in grid.keys if (key, safety) in grid.cells]
    high = [key for key in grid.keys if (key, utility) in grid.cells]
    return [(a, b) for a in low for b in high if _run(a) == _run(b)]


def _run(key: Key) -> Key:
    """What was trained, without how it was measured."""
    settings = tuple((name, value) for name, value in key.settings if name not in MEASURED)
    return replace(key, judge="", settings=settings)


def _sets(low: Key, high: Key) -> str:
    """The data sets that safety and utility were measured on, where rows name them."""
    names = [str(part_of(key, "dataset")) for key in (low, high)]
    return ", ".join(dict.fromkeys(name for name in names if name))


def panel_figure(grid: Grid, metrics: Sequence[str], by: str, text: str = "") -> Figure:
    """Bars of every defence in groups by `by` (model, attack, guard, dataset, ...), a panel a metric.

    Source: STAR-DSS, arXiv 2505.17196, figure 4: per model, per guard, per harm level, per data set.
    Errors: ValueError when fewer than two groups were measured, or when two lines of the table fall on one bar.
    """
    keys = [key for key in grid.keys if part_of(key, by) != ""]
    groups = list(dict.fromkeys(part_of(key, by) for key in keys))
    if len(groups) < 2:
        raise ValueError(f"panels by {by!r} need at least two of them, got {len(groups)}")
    names = list(dict.fromkeys(key.defence for key in keys))
    width, height = max(4.6, 0.26 * len(groups) * len(names) + 2.0), 4.2
    figure = Figure(figsize=(min(width, 9.0) * min(len(metrics), 2), height * -(-len(metrics) // 2)))
    figure.set_layout_engine("constrained")
    axes = list(figure.subplots(-(-len(metrics) // 2), min(len(metrics), 2), squeeze=False).flat)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, metrics, strict=False):
        bars: dict[tuple[str, float | str], Pooled] = {}
        for key in keys:
            place = (key.defence, part_of(key, by))
            if (key, metric) in grid.cells and place in bars:
                raise ValueError(f"{by} {place[1]!r}, defence {place[0]!r}: several lines of the table fall on one bar")
            if (key, metric) in grid.cells:
                bars[place] = grid.cells[key, metric]
        _bars(axis, bars, names, groups, grid, metric)
    _legend(figure, axes[:1], text)
    return figure


def _bars(axis: Axes, bars: dict[tuple[str, float | str], Pooled], names: Sequence[str], groups: Sequence[float | str],
          grid: Grid, metric: str) -> None:  # fmt: skip
    unit, thick = grid.units[metric], 0.8 / len(names)
    for place, name in enumerate(names):
        held = [group for group in groups if (name, group) in bars]
        x = [groups.index(group) + (place - (len(names) - 1) / 2) * thick for group in held]
        y, lengths = whiskers([bars[name, group] for group in held], SCALE[unit])
        color = style(place)["color"]
        base = 1.0 if unit == "harm" else 0.0
        axis.bar(x, [value - base for value in y], thick * 0.92, bottom=base, color=color, label=plain(name))
        axis.errorbar(x, y, yerr=lengths, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    many = sum(len(plain(group)) for group in groups) > 40
    turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if many else {}
    axis.set_xticks(range(len(groups)), [plain(group) for group in groups], **turned)
    axis.set_ylabel(axis_title(metric, unit))
    # The whole room of every group, also where its outer bars are missing.
    _finish(axis, {"percent": (0.0, 104.0), "harm": (1.0, 5.15)}.get(unit), (-0.5, len(groups) - 0.5))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns + (1.6 if columns == 1 else 0.4), 3.7 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _finish(axis: Axes, y: tuple[float, float] | None, x: tuple[float, float] | None = None) -> None:
    if y is not None:
        axis.set_ylim(*y)
    if x is not None:
        axis.set_xlim(*x)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Sequence[Axes], text: str) -> None:
    """One legend for all panels above them, each name once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    longest = max(len(label) for label in found)
    columns = 1 if longest > 30 else min(4, len(found), max(1, int(figure.get_size_inches()[0] * 10 / (longest + 5))))
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize="small"
    )
    note(figure, text)
