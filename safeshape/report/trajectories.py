"""Mean STAR score against response progress: figure 3 of STAR-DSS, with bootstrap bands.

Shape suffixes: R answers, P positions.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are files; no display is needed
import numpy as np
from matplotlib.figure import Figure

from safeshape.report.tables import WORLD_NOTE
from safeshape.signals.scored import Scored, at_progress
from safeshape.stats import mean_band

PROGRESS = np.arange(101) / 100  # of the answer's characters
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a7a7a",
)  # Okabe and Ito: colour-blind safe
_DASHES = ("-", "--", "-.", ":")
_LONGEST = 40


@dataclass(frozen=True, kw_only=True)
class MeanTrajectory:
    """The mean score of a group of answers along their progress.

    `n`: answers counted; `failed`: those without a score. `progress`: shares of the answer read. `mean` is empty for a
    group without answers; `low` and `high`, the 95 % bootstrap band at each position, also for a group of one.
    """

    group: str
    n: int
    failed: int
    progress: tuple[float, ...]
    mean: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def mean_trajectory(group: str, items: Iterable[Scored], *, seed: int = 0, resamples: int = 1000) -> MeanTrajectory:
    """Resample every trajectory on one grid, as the step function it is, and average over answers.

    Source: STAR-DSS, arXiv 2505.17196, figure 3.
    Differs: the band is the bootstrap's, answers resampled.
    """
    rows, failed = [], 0
    for item in items:
        if item.score.p_safe is None:
            failed += 1
        else:
            rows.append(at_progress(item.score, len(item.answer), PROGRESS))
    found: dict[str, tuple[float, ...]] = {"progress": tuple(PROGRESS.tolist())}
    if rows:
        values_RP = np.array(rows)
        found["mean"] = tuple(values_RP.mean(axis=0).tolist())
        if len(rows) > 1:
            low_P, high_P = mean_band(values_RP, seed=seed, resamples=resamples)
            found |= {"low": tuple(low_P.tolist()), "high": tuple(high_P.tolist())}
    return MeanTrajectory(group=group, n=len(rows), failed=failed, **found)


def progress_figure(groups: Sequence[MeanTrajectory], note: str = "") -> Figure:
    """One line and band a group; a group without answers stands in the legend only."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    for place, group in enumerate(groups):
        color, dash = _COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)]
        x = [100 * at for at in group.progress][: len(group.mean)]
        axis.plot(x, group.mean, color=color, linestyle=dash, linewidth=2, label=_label(group))
        if group.low:
            axis.fill_between(x, group.low, group.high, color=color, alpha=0.18, linewidth=0)
    axis.axhline(0.5, color="#7a7a7a", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, 100), ylim=(-0.02, 1.02), xlabel="share of the answer read, %", ylabel="mean p_safe (STAR)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2 if len(groups) > 1 else 1, frameon=False, fontsize="small")
    if note:
        figure.supxlabel(note, fontsize="x-small")
    return figure


def _label(group: MeanTrajectory) -> str:
    """A name as matplotlib shows it: `$` begins its formulas, a leading underscore hides a line."""
    name = "".join(letter if letter.isprintable() else "\ufffd" for letter in group.group)
    name = name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."
    failed = f", {group.failed} failed" if group.failed else ""
    return f"\u200b{name}".replace("$", r"\$") + f" (n={group.n}{failed})"


def write_progress(
    path: Path, groups: Sequence[MeanTrajectory], *, scorers: Sequence[Mapping[str, Any]], world: bool
) -> tuple[Path, ...]:
    """Write the figure as .png and .svg and its numbers as .json, all with the stem of `path`.

    Errors: ValueError when no group has a scored answer.
    """
    if not any(group.n for group in groups):
        raise ValueError("no row has a score, so there is no trajectory to draw")
    figure = progress_figure(groups, WORLD_NOTE if world else "")
    png, svg, data = (path.with_suffix(suffix) for suffix in (".png", ".svg", ".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "safeshape"}):  # the same data gives the same file
        figure.savefig(svg, metadata={"Date": None})
    content = {"world": world, "scorers": list(scorers), "groups": [asdict(group) for group in groups]}
    data.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return png, svg, data
