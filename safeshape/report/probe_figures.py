"""The papers' figures of a probe: AUROC layer by layer, attribution, and a radar of poolings across models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are files; no display is needed
import numpy as np
from matplotlib.figure import Figure

from safeshape.report.figures import COLORS
from safeshape.report.tables import WORLD_NOTE

Results = Mapping[str, Any]
_PROTOCOLS = (("in_distribution", "held-out prompts"), ("left_out", "held-out data sets or kinds"))


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG; returns the paths."""
    figures = {
        "probe-layers": layer_figure(results),
        "probe-radar": radar_figure(results),
        "probe-left-out": comparison_figure(results),
    }
    if all(model["attribution"] is not None for model in results["models"]):
        figures["probe-attribution"] = attribution_figure(results)
    paths = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _noted(figure: Figure, results: Results, text: str) -> Figure:
    note = f"{text} {WORLD_NOTE}" if results["world"] else text
    figure.supxlabel(note, fontsize="x-small", wrap=True)
    return figure


def _shown(name: str) -> str:
    return Path(name.rstrip("/")).name if "/" in name else name


def layer_figure(results: Results) -> Figure:
    """AUROC of a probe on one layer against the layer, a panel per model; bands are 95 % bootstrap intervals."""
    models = results["models"]
    figure = Figure(figsize=(4.3 * len(models) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        entries = model["sweep"]["layers"]
        place = 0
        for pooling in dict.fromkeys(entry["pooling"] for entry in entries):
            mine = [entry for entry in entries if entry["pooling"] == pooling]
            x = [entry["layer"] for entry in mine]
            for (name, label), style in zip(_PROTOCOLS, ("--", "-"), strict=True):
                color = COLORS[place % len(COLORS)]
                axis.plot(
                    x,
                    [e[name]["value"] for e in mine],
                    style,
                    color=color,
                    marker="o",
                    markersize=3,
                    label=f"{pooling} token{'s' if pooling == 'mean' else ''}, {label}",
                )
                axis.fill_between(
                    x,
                    [e[name]["low"] for e in mine],
                    [e[name]["high"] for e in mine],
                    color=color,
                    alpha=0.15,
                    linewidth=0,
                )
                place += 1
        axis.axhline(0.5, color="#7a7a7a", linewidth=0.8, linestyle=":")
        axis.set(title=_shown(model["model"]), xlabel="hidden state (0: embedding)")
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", integer=True)
    axes[0].set_ylabel("AUROC")
    axes[-1].legend(fontsize="x-small", loc="lower right")
    return _noted(figure, results, f"Probe on one layer, C = {models[0]['sweep']['C']:g}; 95 % bootstrap bands.")


def radar_figure(results: Results) -> Figure:
    """AUROC of each pooling of all layers, one line per model; a panel for prompts, a panel for sets left out."""
    models = results["models"]
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, subplot_kw={"projection": "polar"})
    values = [
        entry[name]["value"] for model in models for entry in model["sweep"]["poolings"] for name, _ in _PROTOCOLS
    ]
    floor = max(0.0, np.floor(10 * min(values) - 0.5) / 10)
    for axis, (name, label) in zip(axes, _PROTOCOLS, strict=True):
        for place, model in enumerate(models):
            entries = model["sweep"]["poolings"]
            angles = np.linspace(0, 2 * np.pi, len(entries), endpoint=False)
            ends = [entry[name]["value"] for entry in entries]
            color = COLORS[place % len(COLORS)]
            axis.plot(
                [*angles, angles[0]],
                [*ends, ends[0]],
                color=color,
                marker="o",
                markersize=4,
                label=_shown(model["model"]),
            )
            axis.fill([*angles, angles[0]], [*ends, ends[0]], color=color, alpha=0.08)
        axis.set_xticks(angles, [f"{e['pooling']} token\n{e['layer_pooling']}" for e in entries], fontsize="small")
        for angle, tick in zip(angles, axis.get_xticklabels(), strict=True):
            side = np.cos(angle)  # names on the right begin at the circle, those on the left end there
            tick.set_horizontalalignment("center" if abs(side) < 0.2 else "left" if side > 0 else "right")
        axis.set_ylim(floor, 1.0)
        marks = np.linspace(floor, 1.0, 5)[1:]
        axis.set_yticks(marks, [f"{mark:.2f}" for mark in marks], fontsize="x-small", color="#555555")
        axis.set_rlabel_position(30)  # between two names
        axis.set_title(label, pad=18)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize="small")
    return _noted(
        figure, results, "AUROC after pooling all layers: over tokens (last, mean), over layers (concat, ...)."
    )


def attribution_figure(results: Results) -> Figure:
    """Log odds that each layer and each tenth of the prompt add: harmful minus harmless prompts, a panel per model."""
    models = results["models"]
    figure = Figure(figsize=(4.3 * len(models) + 0.8, 4.0), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        found = model["attribution"]
        values = np.array(found["harmful"]) - np.array(found["harmless"])
        most = float(np.abs(values).max())
        image = axis.imshow(values, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
        axis.set_yticks(range(len(found["layers"])), found["layers"])
        axis.set_xticks([0, values.shape[1] - 1], ["first tenth", "last tenth"])
        axis.set(title=_shown(model["model"]), xlabel="part of the prompt, template included")
        figure.colorbar(image, ax=axis, shrink=0.8)
    axes[0].set_ylabel("hidden state (0: embedding)")
    text = (
        f"Added log odds of harm, mean of {models[0]['attribution']['prompts_of_each']} harmful minus as many harmless "
        "held-out prompts; probe on the mean over tokens, all layers side by side."
    )
    return _noted(figure, results, text)


def comparison_figure(results: Results) -> Figure:
    """Probe and bag of words on every set that was left out, with 95 % intervals; a panel per model."""
    models = results["models"]
    kinds = ("in distribution", "data set left out", "test set")
    most = max(sum(row["kind"] in kinds for row in model["units"]) for model in models)
    figure = Figure(figsize=(5.2 * len(models), 0.42 * most + 1.8), layout="constrained")
    axes = figure.subplots(1, len(models), sharex=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        rows = [row for row in model["units"] if row["kind"] in kinds]
        for offset, (method, label) in zip(
            (-0.15, 0.15), (("probe", "probe"), ("bag_of_words", "bag of words")), strict=True
        ):
            found = [row[method]["auroc"] for row in rows]
            error = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
            axis.errorbar(
                [f["value"] for f in found],
                np.arange(len(rows)) + offset,
                xerr=np.maximum(error, 0),
                fmt="o",
                markersize=4,
                capsize=2,
                color=COLORS[0 if method == "probe" else 2],
                label=label,
            )
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.invert_yaxis()
        axis.set(title=_shown(model["model"]), xlabel="AUROC")
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    return _noted(figure, results, "Sets were left out of fitting and of every choice. 95 % bootstrap intervals.")
