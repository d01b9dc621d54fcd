"""Figures: bars of every metric, the STAR score along single answers, and how reliable scores are."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are files; no display is needed
from matplotlib.figure import Figure

from safeshape.report.tables import table
from safeshape.types import Row, Score

COLORS = ("#33658a", "#d64541", "#e08e2b", "#8e6bbf", "#5b8c5a", "#2e8b57", "#1f9e9e", "#7a7a7a")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A scored answer to show: its label (what kind of example), prompt, answer and score."""

    label: str
    prompt: str
    answer: str
    score: Score


def image_tag(figure: Figure, alt: str) -> str:
    """The figure as an HTML image that needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def bar_figure(rows: Sequence[Row]) -> Figure:
    """One panel per metric, one bar per defence, whiskers for the 95 % interval."""
    metrics, found = table(rows)
    figure = Figure(figsize=(3.1 * len(metrics), 0.42 * len(found) + 1.2))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    names = list(found)
    for axis, metric in zip(axes, metrics, strict=True):
        for place, name in enumerate(names):
            row = found[name][metric]
            error = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            axis.barh(place, 100 * row.value, xerr=error, color=COLORS[place % len(COLORS)], height=0.7, capsize=2)
        axis.set(title=metric.replace("_", " "), xlim=(0, 100), xlabel="%")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def trajectory_figure(trajectories: Sequence[Trajectory]) -> Figure:
    """STAR against the share of the answer that the guard has read, one panel per example."""
    columns = min(3, max(1, len(trajectories)))
    lines = max(1, -(-len(trajectories) // columns))
    figure = Figure(figsize=(3.6 * columns, 1.9 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis in panels.flat[len(trajectories) :]:
        axis.set_visible(False)
    for place, item in enumerate(trajectories):
        axis, length = panels.flat[place], max(len(item.answer), 1)
        x = [0.0] + [100 * span.end / length for span in item.score.spans]
        y = [span.p_safe for span in item.score.spans]
        axis.step(x, [*y[:1], *y], where="pre", color=COLORS[0], linewidth=2)
        axis.fill_between(x, [*y[:1], *y], 1, step="pre", color=COLORS[1], alpha=0.15, linewidth=0)
        axis.set(title=item.label, ylim=(-0.05, 1.05), xlim=(0, 100))
        axis.grid(alpha=0.3)
    figure.supxlabel("share of the answer read, %", fontsize="medium")
    figure.supylabel("p_safe", fontsize="medium")
    return figure


def reliability_figure(panels: Mapping[str, Mapping[str, Any]], note: str = "") -> Figure:
    """The share of safe answers against the mean p_safe of each bin, with Wilson intervals; one panel per name.

    `panels`: figures of `safeshape.signals.reliability.quality`. The area of a point grows with its bin's n.
    """
    figure = Figure(figsize=(4.2 * len(panels), 4.9), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(axes, panels.items(), strict=True):
        bins, ece = found["bins"], found["ece"]
        x, y = [item["p_safe"] for item in bins], [item["safe"] for item in bins]
        error = [[item["safe"] - item["low"] for item in bins], [item["high"] - item["safe"] for item in bins]]
        axis.plot([0, 1], [0, 1], color="#7a7a7a", linestyle="--", linewidth=1)
        axis.errorbar(x, y, yerr=error, fmt="none", ecolor=COLORS[0], elinewidth=1, capsize=2)
        largest = max(item["n"] for item in bins)
        axis.scatter(x, y, s=[90 * item["n"] / largest for item in bins], color=COLORS[0], zorder=3)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="mean p_safe of the bin")
        interval = f" ({ece['low']:.3f}-{ece['high']:.3f})" if ece["low"] is not None else ""
        axis.set_title(f"{name}: ECE {ece['value']:.3f}{interval}, n={found['n']}", fontsize="small")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share that is safe")
    if note:
        figure.supxlabel(note, fontsize="x-small", wrap=True)
    return figure
