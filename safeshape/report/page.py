"""The report's page: tables, figures and, where asked for, answers side by side; one HTML file that loads nothing.

All text from data is escaped. A content security policy allows the page's own style and the images within it, nothing
else: no script, no other file, no network.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from safeshape.data import answer_of, as_messages
from safeshape.report.figures import image_tag
from safeshape.report.grid import Grid
from safeshape.report.tables import WORLD_NOTE
from safeshape.report.texts import html_table, visible

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
.wide { overflow: auto; max-height: 90vh; width: fit-content; max-width: calc(100vw - 3rem); position: relative;
  left: 50%; transform: translateX(-50%); }
.wide p { max-width: 72rem; }
thead th { position: sticky; top: 0; background: #fff; }
.number { white-space: nowrap; }
small { display: block; color: #555; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
.note { background: #fff6dd; border-left: 4px solid #e0a800; padding: .6rem 1rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
.side { border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
.side dt { font-weight: 600; }
.side dd, .side .prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6rem; }
.side .prompt { color: #555; }
code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A prompt with the answers of several models to it, by their names; `counts`: which of them count, where known."""

    prompt: str
    answers: Mapping[str, str]
    counts: Mapping[str, bool] = field(default_factory=dict)


def side_by_side(files: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Side]:
    """Join the rows of several models by their prompts, in the order of the first model's.

    A row is a conversation as for training (`messages`, or `prompt` and `completion`) with an answer; `success`, where
    it has one, says whether the answer counts.
    Errors: ValueError that names the model and row; also where no prompt has answers of all models.
    """
    prompts: dict[str, Side] = {}
    for name, rows in files.items():
        for place, row in enumerate(rows):
            try:
                answer, messages = answer_of(row), as_messages(row)
            except ValueError as error:
                raise ValueError(f"{name}: row {place}: {error}") from error
            prompt = "\n".join(str(message["content"]) for message in messages[:-1])
            held = prompts.get(prompt, Side(prompt=prompt, answers={}))
            success = row.get("success")
            if success is not None and not isinstance(success, bool):
                raise ValueError(f"{name}: row {place}: success must be true or false, got {success!r}")
            counts = {**held.counts, **({} if success is None else {name: success})}
            prompts[prompt] = Side(prompt=prompt, answers={**held.answers, name: answer}, counts=counts)
    found = [side for side in prompts.values() if len(side.answers) == len(files)]
    if not found:
        raise ValueError(f"no prompt has an answer of each of: {', '.join(files)}")
    return found


def _escaped(text: object) -> str:
    return html.escape("".join(a if a == "\n" else visible(a) for a in str(text)), quote=True)


def _side(side: Side) -> str:
    parts = []
    for name, answer in side.answers.items():
        verdict = {True: " (counts)", False: " (does not count)"}.get(side.counts[name]) if name in side.counts else ""
        parts.append(f"<dt>{_escaped(name)}{verdict}</dt><dd>{_escaped(answer)}</dd>")
    return f'<div class="side"><p class="prompt">{_escaped(side.prompt)}</p><dl>{"".join(parts)}</dl></div>'


def write_page(
    path: Path,
    *,
    title: str,
    grid: Grid,
    figures: Mapping[str, Figure],
    facts: Mapping[str, str],
    sides: Sequence[Side] = (),
    limit: int = 50,
) -> None:
    """Write the page. `figures`: by what they show. `facts`: short statements. `limit`: prompts shown side by side."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    note = f'<p class="note">{WORLD_NOTE}</p>' if grid.world else ""
    listed = "".join(f"<li>{_escaped(name)}: <code>{_escaped(value)}</code></li>" for name, value in facts.items())
    drawn = "".join(
        f"<h2>{_escaped(name)}</h2><figure>{image_tag(figure, name)}</figure>" for name, figure in figures.items()
    )
    answers = ""
    if sides:
        answers = f"<h2>Answers side by side</h2><p>{min(limit, len(sides))} of {len(sides)} prompts.</p>"
        answers += "".join(_side(side) for side in sides[:limit])
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" '
        f'content="no-referrer"><title>{_escaped(title)}</title><style>{_STYLE}</style></head><body>\n'
        f'<h1>{_escaped(title)}</h1>{note}\n<h2>Results</h2><div class="wide">{html_table(grid)}</div>\n{drawn}\n'
        f"{answers}<h2>Made from</h2><ul>{listed}</ul></body></html>\n",
        encoding="utf-8",
    )
