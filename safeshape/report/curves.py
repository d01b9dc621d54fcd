"""A metric against a setting (harmful share, learning rate, chunk size, KL weight, ...), safety against utility, and
panels by model, guard or data set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safeshape.report.drawing import COLORS, HATCHES, SCALE, axis_title, limits, note, plain, style, whiskers, wrapped
from safeshape.report.grid import Grid, part_of
from safeshape.report.places import MEASURED, UNATTACKED, Place, along, before, named, place_of, told_apart
from safeshape.report.rows import Key, Pooled

LOGARITHMIC = ("learning_rate", "chunk", "kl", "epsilon")
_NAMES = {
    "harmful_share": "harmful share of the data, %",
    "learning_rate": "learning rate",
    "chunk": "chunk size",
    "kl": "weight of the KL term",
}
_COLUMNS = 3
_MOST = 12  # panels in one figure
_TICKS = 8  # as many values stand on a logarithmic axis themselves
Lines = dict[str, list[tuple[float, Key]]]


def varying(grid: Grid) -> list[str]:
    """The settings that can be an axis: some line has at least two values of them, all else the same."""
    found = dict.fromkeys(name for key in grid.keys for name, _ in key.settings)
    return [name for name in found if any(_panels_of(grid, metric, name) for metric in grid.metrics)]


def _panels_of(grid: Grid, metric: str, setting: str) -> dict[Place, Lines]:
    """The lines with two values or more of every panel that has any, each in order of the setting."""
    found: dict[Place, Lines] = {}
    for key in grid.keys:
        value = dict(key.settings).get(setting)
        if isinstance(value, int | float) and (key, metric) in grid.cells:
            own = along(key, setting)
            lines = found.setdefault(place_of(own, without=[setting]), {})
            lines.setdefault(plain(named(own, setting)), []).append((float(value), key))
    for place, lines in found.items():
        for name, points in lines.items():
            points.sort(key=lambda point: point[0])
            if len({value for value, _ in points}) < len(points):
                raise ValueError(f"{place.attack!r}, {name!r}: several lines of the table fall on one point")
    kept = {place: {n: points for n, points in lines.items() if len(points) > 1} for place, lines in found.items()}
    return {place: lines for place, lines in kept.items() if lines}


def _flat(grid: Grid, metric: str, setting: str, place: Place) -> dict[str, Pooled]:
    """What has no value of the setting and belongs to the panel: the model before, and defences without that knob."""
    found = {}
    for key in grid.keys:
        if setting in dict(key.settings) or (key, metric) not in grid.cells:
            continue
        if before(key, place) or place_of(key) == place:
            found[plain(named(key, setting))] = grid.cells[key, metric]
    return found


def curve_figure(grid: Grid, metric: str, setting: str, *, logarithmic: bool | None = None, text: str = "") -> Figure:
    """The metric against the setting: a line a defence, whiskers for intervals.

    A panel for each attack, model, judge and other settings under which some line has two values or more. What is
    without the setting (an untouched model) is a horizontal dotted line. `logarithmic`: None for learning rate, chunk
    and KL weight where all are above 0.
    Errors: ValueError when no line has two values, or two rows of the table fall on one point.
    """
    panels = _panels_of(grid, metric, setting)
    if not panels:
        raise ValueError(f"a curve of {metric!r} needs at least two values of {setting!r} with all else the same")
    values = sorted({value for lines in panels.values() for points in lines.values() for value, _ in points})
    if logarithmic is None:
        logarithmic = setting in LOGARITHMIC and min(values) > 0
    flat = {place: _flat(grid, metric, setting, place) for place in panels}
    names = list(dict.fromkeys(name for place in panels for name in (*panels[place], *flat[place])))
    figure, axes = _panels(len(panels))
    unit, stretch = grid.units[metric], 100.0 if setting == "harmful_share" else 1.0
    titles = told_apart(list(panels))
    for axis, (place, lines), title in zip(axes, panels.items(), titles, strict=True):
        for name, cell in flat[place].items():
            look = {**style(names.index(name)), "linestyle": ":", "marker": ""}
            axis.axhline(SCALE[unit] * cell.value, label=name, **look)
        for name, points in lines.items():
            y, lengths = whiskers([grid.cells[key, metric] for _, key in points], SCALE[unit])
            x = [stretch * value for value, _ in points]
            axis.errorbar(x, y, yerr=lengths, label=name, capsize=3, linewidth=1.8, **style(names.index(name)))
        axis.set_title(wrapped(title), fontsize="medium")
        axis.set_xlabel(_NAMES.get(setting, plain(setting.replace("_", " "))))
        if logarithmic:
            axis.set_xscale("log")
        if logarithmic and len(values) <= _TICKS:
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.minorticks_off()
        _finish(axis, limits(unit))
    axes[0].set_ylabel(axis_title(metric, unit))
    _legend(figure, axes, text)
    return figure


def scatter_figures(grid: Grid, safety: str, utility: str, text: str = "") -> list[Figure]:
    """Safety against utility: a mark a model, whiskers both ways; the best corner is the lower right one.

    `safety`: a metric that should be low, `utility`: one that should be high; the two may be of different data sets.
    Panels by attack, model, settings and data sets, twelve in a figure; those with one mark alone only where no panel
    has two.
    Errors: ValueError when no model has both.
    """
    pairs = _pairs(grid, safety, utility)
    if not pairs:
        raise ValueError(f"no line of the table has both {safety!r} and {utility!r}")
    every = list(dict.fromkeys((_trained(low), _sets(low, high)) for low, high in pairs))
    # What was not attacked is the state before, and stands in the panels of the attacks on the same model.
    attacked = {(place.model, sets) for place, sets in every if place.attack != UNATTACKED}
    panels = {
        (place, sets): [(low, high) for low, high in pairs if _sets(low, high) == sets and _inside(low, place)]
        for place, sets in every if place.attack != UNATTACKED or (place.model, sets) not in attacked
    }  # fmt: skip
    most = max(map(len, panels.values()))
    panels = {panel: marks for panel, marks in panels.items() if len(marks) > 1 or most == 1}
    titles = [(title, sets) for title, (_, sets) in zip(told_apart([p for p, _ in panels]), panels, strict=True)]
    shown = list(zip(titles, panels.values(), strict=True))
    return [_scatter(grid, safety, utility, shown[at : at + _MOST], text) for at in range(0, len(shown), _MOST)]


def _inside(key: Key, place: Place) -> bool:
    return _trained(key) == place or before(replace(key, judge=""), place)


def _scatter(grid: Grid, safety: str, utility: str,
             panels: Sequence[tuple[tuple[str, str], Sequence[tuple[Key, Key]]]], text: str) -> Figure:  # fmt: skip
    names = list(dict.fromkeys(named(low) for _, marks in panels for low, _ in marks))
    figure, axes = _panels(len(panels))
    for axis, (title, marks) in zip(axes, panels, strict=True):
        for low, high in marks:
            x, across = whiskers([grid.cells[high, utility]], SCALE[grid.units[utility]])
            y, upright = whiskers([grid.cells[low, safety]], SCALE[grid.units[safety]])
            look = {**style(names.index(named(low))), "linestyle": "", "markersize": 8, "capsize": 3}
            axis.errorbar(x, y, xerr=across, yerr=upright, label=plain(named(low)), **look)
        axis.set_title("\n".join(wrapped(part) for part in title if part), fontsize="medium")
        axis.set_xlabel(axis_title(utility, grid.units[utility]))
        _finish(axis, limits(grid.units[safety]), limits(grid.units[utility]))
    axes[0].set_ylabel(axis_title(safety, grid.units[safety]))
    _legend(figure, axes, text)
    return figure


def _pairs(grid: Grid, safety: str, utility: str) -> list[tuple[Key, Key]]:
    """Lines with the safety metric and lines with the utility metric of one model, whatever they were measured on."""
    high: dict[tuple[str, Place], list[Key]] = {}
    for key in grid.keys:
        if (key, utility) in grid.cells:
            high.setdefault(_run(key), []).append(key)
    return [(a, b) for a in grid.keys if (a, safety) in grid.cells for b in high.get(_run(a), [])]


def _run(key: Key) -> tuple[str, Place]:
    """What was trained, without how it was measured."""
    return named(key), _trained(key)


def _trained(key: Key) -> Place:
    return replace(place_of(key, without=MEASURED), judge="")


def _sets(low: Key, high: Key) -> str:
    """The data sets that safety and utility were measured on, where rows name them."""
    names = [str(part_of(key, "dataset")) for key in (low, high)]
    return ", ".join(dict.fromkeys(name for name in names if name))


def panel_figures(grid: Grid, metrics: Sequence[str], by: str, text: str = "") -> dict[str, Figure]:
    """Bars of every defence in groups by `by` (model, attack, guard, dataset, ...), a panel a metric.

    A figure for each attack and other settings under which there are two groups or more, by what tells them apart.
    Source: STAR-DSS, arXiv 2505.17196, figure 4: per model, per guard, per harm level, per data set.
    Errors: ValueError when fewer than two groups were measured, or when two lines of the table fall on one bar.
    """
    keys = [key for key in grid.keys if part_of(key, by) != ""]
    count = len({part_of(key, by) for key in keys})
    if count < 2:
        raise ValueError(f"panels by {by!r} need at least two of them, got {count}")
    places = list(dict.fromkeys(_grouped(key, by) for key in keys))
    inside = {p: [key for key in keys if _grouped(key, by) == p or _grouped_before(key, by, p)] for p in places}
    attacked = any(place.attack != UNATTACKED for place in places)
    shown = {
        place: members for place, members in inside.items()
        if len({part_of(key, by) for key in members if _grouped(key, by) == place}) > 1
        and not (attacked and place.attack == UNATTACKED)
    }  # fmt: skip
    if not shown:
        raise ValueError(f"panels by {by!r} need two of them with all else the same")
    titles = told_apart(list(shown))
    found = [_grouped_bars(grid, m, metrics, by, title, text) for m, title in zip(shown.values(), titles, strict=True)]
    return dict(zip(titles, found, strict=True))


def _grouped(key: Key, by: str) -> Place:
    """What a figure's bars have in common."""
    place = replace(place_of(key, without=[*MEASURED, by]), judge="")
    return replace(place, attack="" if by == "attack" else place.attack, model="" if by == "model" else place.model)


def _grouped_before(key: Key, by: str, place: Place) -> bool:
    model = "" if by == "model" else key.model
    return by != "attack" and before(replace(key, model=model, judge=""), place)


def _grouped_bars(grid: Grid, keys: Sequence[Key], metrics: Sequence[str], by: str, title: str,
                  text: str) -> Figure:  # fmt: skip
    metrics = [metric for metric in metrics if any((key, metric) in grid.cells for key in keys)]
    names = list(dict.fromkeys(named(key) for key in keys))
    groups = list(dict.fromkeys(part_of(key, by) for key in keys))
    width, height = max(4.6, 0.26 * len(groups) * len(names) + 2.0), 4.2
    figure = Figure(figsize=(min(width, 9.0) * min(len(metrics), 2), height * -(-len(metrics) // 2)))
    figure.set_layout_engine("constrained")
    axes = list(figure.subplots(-(-len(metrics) // 2), min(len(metrics), 2), squeeze=False).flat)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, metrics, strict=False):
        bars: dict[tuple[str, float | str], Pooled] = {}
        for key in keys:
            at = (named(key), part_of(key, by))
            if (key, metric) in grid.cells and at in bars:
                raise ValueError(f"{by} {at[1]!r}, defence {at[0]!r}: several lines of the table fall on one bar")
            if (key, metric) in grid.cells:
                bars[at] = grid.cells[key, metric]
        _bars(axis, bars, names, groups, grid, metric)
        axis.set_title(wrapped(title), fontsize="medium")
    _legend(figure, axes[:1], text)
    return figure


def _bars(axis: Axes, bars: dict[tuple[str, float | str], Pooled], names: Sequence[str], groups: Sequence[float | str],
          grid: Grid, metric: str) -> None:  # fmt: skip
    unit, thick = grid.units[metric], 0.8 / len(names)
    for place, name in enumerate(names):
        held = [group for group in groups if (name, group) in bars]
        x = [groups.index(group) + (place - (len(names) - 1) / 2) * thick for group in held]
        y, lengths = whiskers([bars[name, group] for group in held], SCALE[unit])
        look = {"color": style(place)["color"], "hatch": HATCHES[place // len(COLORS) % len(HATCHES)]}
        base = 1.0 if unit == "harm" else 0.0
        axis.bar(
            x, [value - base for value in y], thick * 0.92, bottom=base, label=plain(name), edgecolor="white", **look
        )
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
    width, height = figure.get_size_inches()
    columns = min(4, len(found), max(1, int(width * 10 / (longest + 5))))
    figure.set_size_inches(width, height + 0.2 * -(-len(found) // columns))
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize="small"
    )
    note(figure, text)
