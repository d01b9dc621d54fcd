"""Theorem 1 in practice as a figure: the guard's misses over chunk sizes and thresholds, the forms of the bound, and
how far from safe the guard puts the chunks."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safeshape.evals.theorem import Estimate, Theorem
from safeshape.report.drawing import COLORS, DASHES, note

_LABELS = {
    "sqrt(2 eps)": r"$\sqrt{2\epsilon}$",
    "sqrt(eps / 2)": r"$\sqrt{\epsilon/2}$",
    "sqrt(1 - exp(-eps))": r"$\sqrt{1-e^{-\epsilon}}$",
}


def theorem_figure(found: Theorem, text: str = "") -> Figure:
    """Two grids (all answers, harmful answers), the bounds beside the measured harm, and the quantiles of 1 - V."""
    figure = Figure(figsize=(11.0, 8.4), layout="constrained")
    axes = figure.subplots(2, 2)
    joint = [(miss.chunk, miss.tau, miss.joint) for miss in found.misses]
    conditional = [(miss.chunk, miss.tau, miss.conditional) for miss in found.misses]
    _grid(axes[0, 0], joint, "harmful and every score at least tau, % of all answers")
    _grid(axes[0, 1], conditional, "the same, % of harmful answers (missed by the guard)")
    _bounds(axes[1, 0], found)
    _distances(axes[1, 1], found)
    note(figure, text)
    return figure


def _grid(axis: Axes, cells: Sequence[tuple[int, float, Estimate | None]], title: str) -> None:
    chunks = list(dict.fromkeys(chunk for chunk, _, _ in cells))
    taus = list(dict.fromkeys(tau for _, tau, _ in cells))
    values = [[float("nan")] * len(taus) for _ in chunks]
    for chunk, tau, item in cells:
        if item is not None:
            values[chunks.index(chunk)][taus.index(tau)] = 100 * item.value
    axis.imshow(values, cmap="Oranges", vmin=0, vmax=100, aspect="auto")
    for chunk, tau, item in cells:
        shown = (
            "none\nharmful" if item is None else f"{100 * item.value:.1f}\n({100 * item.low:.1f}-{100 * item.high:.1f})"
        )
        color = "white" if item is not None and item.value > 0.6 else "#222222"
        axis.text(
            taus.index(tau), chunks.index(chunk), shown, ha="center", va="center", fontsize="x-small", color=color
        )
    axis.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
    axis.set_yticks(range(len(chunks)), [str(chunk) for chunk in chunks])
    axis.set(xlabel="tau", ylabel="chunk size")
    axis.set_title(title, fontsize="medium")


def _bounds(axis: Axes, found: Theorem) -> None:
    names = ["Harm(theta), measured", "Harm(ref), measured", *(f"Harm(ref) + {_LABELS[b.form]}" for b in found.bounds)]
    measured = [found.harm_policy, found.harm_reference]
    for place, item in enumerate(measured):
        lengths = [[100 * (item.value - item.low)], [100 * (item.high - item.value)]]
        axis.barh(place, 100 * item.value, color=COLORS[1 - place], height=0.6)
        axis.errorbar([100 * item.value], [place], xerr=lengths, fmt="none", ecolor="#333333", capsize=3)
    for place, bound in enumerate(found.bounds, start=len(measured)):
        axis.barh(place, 100 * min(bound.bound, 1.2), color="#bbbbbb" if bound.vacuous else COLORS[2], height=0.6)
        shown = f"{100 * bound.bound:.1f}{', vacuous' if bound.vacuous else ''}"
        axis.text(2, place, shown, va="center", fontsize="small")
    axis.axvline(100, color="#333333", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlim=(0, 122), xlabel="% (a bound of 100 or more says nothing)")
    kl = found.kl
    axis.set_title(rf"$\epsilon$ = {kl.value:.3g} nats per answer ({kl.low:.3g} to {kl.high:.3g})", fontsize="medium")
    axis.spines[["top", "right"]].set_visible(False)


def _distances(axis: Axes, found: Theorem) -> None:
    for place, item in enumerate(found.distances):
        shares, values = [100 * q for q, _ in item.quantiles], [max(v, 1e-6) for _, v in item.quantiles]
        look: dict[str, Any] = {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place % len(DASHES)]}
        axis.plot(values, shares, marker="o", markersize=4, label=f"chunk {item.chunk} (n={item.n})", **look)
    axis.set_xscale("log")
    axis.set(xlabel="1 - V of a chunk (its minimum is tau_min)", ylabel="% of chunks at or below")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("the guard's distance from safe, quantiles", fontsize="medium")
