"""Rows of results as a table, figures and one self-contained HTML page. All text from data is escaped."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # figures are files; no display is needed
from matplotlib.figure import Figure

from safeshape.types import Row, Score

WORLD_NOTE = (
    "Measured on the embedded synthetic world: tiny models, an invented language, placeholder acts. "
    "It is a test bench and says nothing about real models."
)
METRIC_NOTE = (
    "Percent of held-out prompts, with 95 % Wilson interval and n. Attack success and over-refusal should be low, "
    "task accuracy (what the user wants learned) and skill accuracy (what the model could do before) high."
)
UNSAFE, SAFE = (214, 69, 65), (46, 139, 87)
_COLORS = ("#33658a", "#d64541", "#e08e2b", "#8e6bbf", "#5b8c5a", "#2e8b57", "#1f9e9e", "#7a7a7a")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { color: #666; }
.note { background: #fff6dd; border-left: 4px solid #e0a800; padding: .6rem 1rem; }
.example { border: 1px solid #ddd; border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0; }
.example .prompt { color: #555; margin-bottom: .4rem; }
.example .answer { white-space: pre-wrap; line-height: 1.9; }
.example span { border-radius: 3px; padding: .1rem 0; }
img { max-width: 100%; height: auto; }
.legend span { padding: .1rem .6rem; border-radius: 3px; margin-right: .4rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A scored answer to show: its label (what kind of example), prompt, answer and score."""

    label: str
    prompt: str
    answer: str
    score: Score


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


def _image(figure: Figure, alt: str) -> str:
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
            axis.barh(place, 100 * row.value, xerr=error, color=_COLORS[place % len(_COLORS)], height=0.7, capsize=2)
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
        axis.step(x, [*y[:1], *y], where="pre", color=_COLORS[0], linewidth=2)
        axis.fill_between(x, [*y[:1], *y], 1, step="pre", color=_COLORS[1], alpha=0.15, linewidth=0)
        axis.set(title=item.label, ylim=(-0.05, 1.05), xlim=(0, 100))
        axis.grid(alpha=0.3)
    figure.supxlabel("share of the answer read, %", fontsize="medium")
    figure.supylabel("p_safe", fontsize="medium")
    return figure


def color(p_safe: float) -> str:
    """A background from red (0) over near-white (0.5) to green (1)."""
    end, strength = (UNSAFE, 1 - 2 * p_safe) if p_safe < 0.5 else (SAFE, 2 * p_safe - 1)
    mixed = [round(255 + (channel - 255) * 0.75 * strength) for channel in end]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def colored_answer(answer: str, score: Score) -> str:
    """The answer as HTML, each span on its color with its score as a tooltip. Everything is escaped."""
    parts, done = [], 0
    for span in score.spans:
        parts.append(html.escape(answer[done : span.start]))
        text = html.escape(answer[span.start : span.end])
        parts.append(f'<span style="background:{color(span.p_safe)}" title="p_safe {span.p_safe:.3f}">{text}</span>')
        done = span.end
    return "".join(parts) + html.escape(answer[done:])


def _html_table(rows: Sequence[Row]) -> str:
    metrics, found = table(rows)
    head = "".join(f"<th>{html.escape(m.replace('_', ' '))}</th>" for m in metrics)
    lines = []
    for defence, cells in found.items():
        shown = "".join(
            f"<td>{cell(cells[m])[0]} <small>({cell(cells[m])[1]}, n={cells[m].n})</small></td>" for m in metrics
        )
        lines.append(f"<tr><td>{html.escape(defence)}</td>{shown}</tr>")
    return f"<table><thead><tr><th>policy</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def write_report(
    path: Path,
    *,
    title: str,
    rows: Sequence[Row],
    trajectories: Sequence[Trajectory],
    facts: Mapping[str, str],
) -> None:
    """Write one HTML page without scripts or outside files. `facts`: short statements about the run."""
    note = f'<p class="note">{WORLD_NOTE}</p>' if any(row.world for row in rows) else ""
    listed = "".join(f"<li><b>{html.escape(k)}</b>: {html.escape(v)}</li>" for k, v in facts.items())
    examples = "".join(
        f'<div class="example"><b>{html.escape(item.label)}</b>'
        f'<div class="prompt">{html.escape(item.prompt)}</div>'
        f'<div class="answer">{colored_answer(item.answer, item.score)}</div></div>'
        for item in trajectories
    )
    legend = "".join(f'<span style="background:{color(p)}">{p:.2f}</span>' for p in (0.0, 0.25, 0.5, 0.75, 1.0))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>{note}<ul>{listed}</ul>
<h2>Results</h2><p>{METRIC_NOTE}</p>{_html_table(rows)}
{_image(bar_figure(rows), "Bars of every metric for every policy, with intervals")}
<h2>STAR trajectories</h2>
<p class="legend">Each chunk of a training answer on the color of its probability of being safe: {legend}</p>
{_image(trajectory_figure(trajectories), "STAR score against the share of the answer read")}
{examples}</body></html>
"""
    path.write_text(page)
