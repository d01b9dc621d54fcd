"""The demo's page: rows of results and scored answers as one HTML file. All text from data is escaped."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from safeshape.report.figures import Trajectory, bar_figure, image_tag, trajectory_figure
from safeshape.report.tables import METRIC_NOTE, WORLD_NOTE, cell, table
from safeshape.types import Row, Score

UNSAFE, SAFE = (214, 69, 65), (46, 139, 87)

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
{image_tag(bar_figure(rows), "Bars of every metric for every policy, with intervals")}
<h2>STAR trajectories</h2>
<p class="legend">Each chunk of a training answer on the color of its probability of being safe: {legend}</p>
{image_tag(trajectory_figure(trajectories), "STAR score against the share of the answer read")}
{examples}</body></html>
"""
    path.write_text(page)
