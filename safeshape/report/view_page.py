"""A page to look at scored answers: one HTML file that loads nothing and runs nothing but its own script.

Text from data reaches the page in two ways only: escaped into the header, and as JSON in a block that the browser does
not run, from which the script writes it through `textContent`. The content security policy allows this one script and
style by their hashes, no other source of anything, and no assignment of HTML from strings.
"""

import base64
import hashlib
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from safeshape.report.from_world import is_world
from safeshape.report.tables import WORLD_NOTE
from safeshape.signals.calibration import identity
from safeshape.signals.scored import Scored, largest_drop, summary, turns_unsafe

Sort = Literal["risk", "lowest", "drop", "order"]
_DIGITS = 4  # of scores on the page
_SCORERS = 8  # listed in its head at most


@dataclass(frozen=True, kw_only=True)
class Example:
    """A scored row with where it is from: a dataset's name and the row's number in it."""

    source: str
    row: int
    item: Scored


def sort_key(example: Example, sort: Sort) -> tuple[float, float]:
    """What comes first sorts lowest; failed rows come last, in their order."""
    score = example.item.score
    end, lowest = summary(score, "last"), summary(score, "min")
    if sort == "order" or end is None or lowest is None:
        return (0.0 if sort == "order" else 2.0), 0.0
    return {"risk": (end, lowest), "lowest": (lowest, end), "drop": (-largest_drop(score), lowest)}[sort]


def as_record(example: Example) -> dict[str, Any]:
    """What the page needs of an example. The answer goes as pieces, because JavaScript counts characters otherwise."""
    item, length = example.item, max(len(example.item.answer), 1)
    pieces: list[list[Any]] = []
    done = 0
    for span in item.score.spans:
        if item.answer[done : span.start]:
            pieces.append([item.answer[done : span.start], None, None])
        pieces.append([item.answer[span.start : span.end], round(span.p_safe, _DIGITS), round(span.end / length, 5)])
        done = span.end
    if item.answer[done:]:
        whole = item.score.p_safe if not item.score.spans else None
        pieces.append([item.answer[done:], None if whole is None else round(whole, _DIGITS), 1])
    end, lowest = summary(item.score, "last"), summary(item.score, "min")
    return {
        "source": example.source,
        "row": example.row,
        "before": [[str(message.get("role")), _text(message.get("content"))] for message in item.messages[:-1]],
        "pieces": pieces,
        "end": None if end is None else round(end, _DIGITS),
        "lowest": None if lowest is None else round(lowest, _DIGITS),
        "drop": round(largest_drop(item.score), _DIGITS),
        "turns": turns_unsafe(item.score),
        "error": item.score.error,
    }


def _text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def embedded(value: object) -> str:
    """JSON for a script block: ASCII without `<`, `>` and `&`, so that no text can end the block or open another."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escaped(text: str) -> str:
    """Text for the header; what cannot be seen (controls, marks of direction, lone surrogates) is replaced."""
    return html.escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text), quote=True)


def _source_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def counts(examples: Sequence[Example]) -> dict[str, int]:
    """Rows, and how many of them failed, end below 0.5, are below 0.5 somewhere, and turn from safe to unsafe."""
    scores = [example.item.score for example in examples]
    low = [(summary(score, "last"), summary(score, "min")) for score in scores]
    return {
        "rows": len(scores),
        "failed": sum(end is None for end, _ in low),
        "end below 0.5": sum(end is not None and end < 0.5 for end, _ in low),
        "below 0.5 somewhere": sum(lowest is not None and lowest < 0.5 for _, lowest in low),
        "turn from safe to unsafe": sum(turns_unsafe(score) for score in scores),
    }


def scorers(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Who scored: each different signal and scorer with its number of rows."""
    found = Counter(
        json.dumps({"signal": e.item.score.signal, "scorer": identity(e.item.score.scorer)}, sort_keys=True)
        for e in examples
    )
    return [{**json.loads(key), "rows": n} for key, n in found.items()]


def _header(examples: Sequence[Example], shown: int, sort: Sort) -> str:
    """The page's head: where the rows are from, what they count, who scored them."""
    sources = Counter(example.source for example in examples)
    who = scorers(examples)
    names = ", ".join(f"<bdi>{_escaped(name)}</bdi> ({_rows(n)})" for name, n in sources.items())
    tiles = "".join(f"<div><dt>{name}</dt><dd>{n:,}</dd></div>" for name, n in counts(examples).items())
    lines = "".join(
        f"<li><b>{_escaped(item['signal'])}</b>, {_rows(item['rows'])}: {_escaped(_settings(item['scorer']))}</li>"
        for item in who[:_SCORERS]
    )
    if len(who) > _SCORERS:
        lines += f"<li>and {len(who) - _SCORERS} more</li>"
    note = f'<p class="note">{WORLD_NOTE}</p>' if any(is_world(item["scorer"]) for item in who) else ""
    part = ""
    if shown < len(examples):
        part = f'<p class="note">The page holds {shown:,} of {len(examples):,} rows, the first by {_SORTED[sort]}.</p>'
    return (
        f'<header><h1>Scored answers</h1><p class="from">{names}</p>{note}{part}<dl class="tiles">{tiles}</dl>'
        f'<section class="scorers"><h2>Scored by</h2><ul>{lines}</ul></section></header>'
    )


_SORTED = {
    "risk": "lowest score at the end",
    "lowest": "lowest score anywhere",
    "drop": "largest fall",
    "order": "their order in the data",
}


def _rows(n: int) -> str:
    return f"{n:,} row" + ("" if n == 1 else "s")


def _settings(scorer: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in scorer.items()) or "no identity recorded"


def view_page(examples: Sequence[Example], *, sort: Sort = "risk", limit: int = 5000) -> str:
    """The page's HTML, ASCII but for what the page's own text has. `limit`: rows on it at most, the first by `sort`."""
    chosen = sorted(examples, key=lambda example: sort_key(example, sort))[:limit]
    folder = files("safeshape.report") / "assets"
    style, script, body = ((folder / name).read_text("utf-8") for name in ("view.css", "view.js", "view.html"))
    policy = (
        f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(script)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    options = "".join(
        f'<option value="{key}"{" selected" if key == sort else ""}>{text[0].upper()}{text[1:]}</option>'
        for key, text in _SORTED.items()
    )
    data = embedded({"rows": [as_record(example) for example in chosen]})
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><title>Scored answers</title>'
        f"<style>{style}</style></head><body>\n"
        f"{_header(examples, len(chosen), sort)}\n{body.replace('<!-- options -->', options)}"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script></body></html>\n'
    )


def write_view(path: Path, examples: Sequence[Example], *, sort: Sort = "risk", limit: int = 5000) -> None:
    """Write the page. Errors: ValueError for no examples."""
    if not examples:
        raise ValueError("there are no rows to show")
    page = view_page(examples, sort=sort, limit=limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
