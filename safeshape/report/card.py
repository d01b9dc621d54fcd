"""The safety card: what was tried on a model, with which outcome, as a section of its model card and as `safety.json`.

It holds names, numbers, hashes and versions. No prompt and no answer is read to write it, so none can stand in it;
names from rows are shortened and escaped.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeshape.provenance import RECORD, versions
from safeshape.report.rows import Key, Pooled, pool, unit_of
from safeshape.report.tables import WORLD_NOTE
from safeshape.report.texts import escaped_markdown, number, visible
from safeshape.types import Row

BEGIN, END = "<!-- safeshape:safety-card:begin -->", "<!-- safeshape:safety-card:end -->"
CARD, README = "safety.json", "README.md"
JUDGE_METRICS = "judge_"  # rows whose metric begins so say how good a judge is, and their `judge` says which
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json", "config.json")
_LONGEST = 80
_NEW = "---\nlibrary_name: transformers\ntags:\n- safeshape\n---\n\n# Model card\n"
_UNIT = {"percent": " %", "harm": " of 5", "number": ""}


def make_card(rows: Sequence[Row], folder: Path, *, defence: str, sources: Sequence[Path] = ()) -> dict[str, Any]:
    """The content of `safety.json` for the model in `folder`, which is the `defence` of its rows.

    Rows of other defences stand beside as controls. `sources`: the files the rows are from, which are hashed.
    Errors: ValueError when no row is of that defence, or the folder holds no model.
    """
    hashes = weight_hashes(folder)
    if not hashes:
        raise ValueError(f"{folder} holds no model: none of {', '.join(_WEIGHTS)}")
    measured = [row for row in rows if not row.metric.startswith(JUDGE_METRICS)]
    if not any(row.defence == defence for row in measured):
        known = ", ".join(dict.fromkeys(row.defence for row in measured))
        raise ValueError(f"no row has the defence {defence!r}; there are: {known}")
    results = _results(measured)
    world = any(row.world for row in rows)
    record = folder / RECORD
    return {
        "format": 1,
        "world": world,
        "note": WORLD_NOTE if world else None,
        "defence": _name(defence),
        "results": [item for item in results if item["defence"] == _name(defence)],
        "controls": [item for item in results if item["defence"] != _name(defence)],
        "judges": _judges(rows),
        "training": _training(json.loads(record.read_text())) if record.is_file() else None,
        "sha256": hashes | {f"results: {path.parent.name}/{path.name}": _sha256(path) for path in sources},
        "versions": versions(),
    }


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and configuration in a folder, by file name."""
    paths = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    return {path.name: _sha256(path) for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(text: object) -> str:
    """A name of at most 80 visible characters: too short for a text that somebody put in place of one."""
    found = visible(str(text))
    return found if len(found) <= _LONGEST else found[: _LONGEST - 3] + "..."


def _results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    units = {metric: unit_of(metric, [r for r in rows if r.metric == metric]) for metric in {r.metric for r in rows}}
    found = []
    for category in dict.fromkeys(row.category for row in rows):
        for (key, metric), cell in pool(rows, category).items():
            found.append(_result(key, metric, category, cell) | {"unit": units[metric]})
    return found


def _result(key: Key, metric: str, category: str | None, cell: Pooled) -> dict[str, Any]:
    return {
        "attack": _name(key.attack),
        "defence": _name(key.defence),
        "model": _name(key.model),
        "settings": {_name(name): _name(v) if isinstance(v, str) else v for name, v in key.settings},
        "metric": _name(metric),
        "category": None if category is None else _name(category),
        "value": cell.value,
        "low": cell.low,
        "high": cell.high,
        "n": cell.n,
        "seeds": list(cell.seeds),
        "interval": cell.method,
        "judge": _name(key.judge),
    }


def _judges(rows: Sequence[Row]) -> dict[str, Any]:
    """Every judge with its measured figures; the world's oracle is exact, any other without figures not measured."""
    found: dict[str, Any] = {}
    for row in rows:
        if not row.metric.startswith(JUDGE_METRICS):
            exact = row.judge == "oracle" and row.world
            state = "exact: it is the rule that made the data" if exact else "not measured"
            found.setdefault(_name(row.judge), {"error": state, "figures": []})
    for item in _results([row for row in rows if row.metric.startswith(JUDGE_METRICS)]):
        judge = found.setdefault(item["judge"], {"figures": []})
        judge["error"] = "measured"
        judge["figures"].append({name: item[name] for name in ("metric", "value", "low", "high", "n", "unit")})
    return found


def _training(record: Mapping[str, Any]) -> dict[str, Any]:
    """From `safeshape.json`: which policy and signal, and the hash of the data; scorers by name only."""
    signals = [{"signal": _name(item.get("signal")), "rows": item.get("rows")} for item in record.get("signals") or []]
    names = ("policy", "reference", "data", "versions")
    return {name: record.get(name) for name in names} | {"signals": signals}


def card_section(card: Mapping[str, Any]) -> str:
    """The section for the model card, between its markers."""
    lines = [BEGIN, "## Safety card", ""]
    if card["note"]:
        lines += [f"**{card['note']}**", ""]
    lines += ["What was tried on this model, written by Safeshape; `safety.json` beside it has every number.", ""]
    lines += ["| attack | metric | value | 95 % interval | n | seeds | judge |", "|---|---|---|---|---|---|---|"]
    lines += [_line(item) for item in card["results"] if item["category"] is None]
    by_category = [item for item in card["results"] if item["category"] is not None]
    if by_category:
        lines += ["", "By category:", "", "| category | attack | metric | value | 95 % interval | n |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_category_line(item) for item in by_category]
    lines += ["", "Not tried is not safe: attacks that are not listed were not run.", "", "Judges:", ""]
    for name, judge in card["judges"].items():
        figures = "; ".join(f"{_text(f['metric'])} {_interval(f)}, n={f['n']}" for f in judge["figures"])
        lines.append(f"- {_text(name)}: error {_text(judge['error'])}{f' ({figures})' if figures else ''}")
    others = sorted({item["defence"] for item in card["controls"]})
    if others:
        lines += ["", f"Controls measured beside it (in `safety.json`): {', '.join(map(_text, others))}."]
    if card["training"] is not None and card["training"]["policy"] is not None:
        policy, data = card["training"]["policy"], card["training"]["data"] or {}
        described = ", ".join(f"{name} {value}" for name, value in policy.items())
        rows, digest = data.get("rows"), str(data.get("sha256"))[:12]
        lines += ["", f"Training: policy {_text(_name(described))}; {rows} rows, SHA-256 {digest}..."]
    found = ", ".join(f"{name} {value}" for name, value in card["versions"].items())
    lines += ["", f"Versions: {_text(found)}.", "", "SHA-256:", ""]
    lines += [f"- {_text(name)}: `{digest}`" for name, digest in card["sha256"].items()]
    return "\n".join([*lines, END])


def _text(text: object) -> str:
    return escaped_markdown(str(text))


def _interval(item: Mapping[str, Any]) -> str:
    unit = item["unit"]
    interval = f"{number(item['low'], unit)} to {number(item['high'], unit)}"
    return f"{number(item['value'], unit)}{_UNIT[unit]} ({interval})"


def _line(item: Mapping[str, Any]) -> str:
    unit, settings = item["unit"], ", ".join(f"{name} {value}" for name, value in item["settings"].items())
    attack = item["attack"] + (f" ({settings})" if settings else "")
    interval = f"{number(item['low'], unit)} to {number(item['high'], unit)}"
    cells = [attack, item["metric"].replace("_", " "), f"{number(item['value'], unit)}{_UNIT[unit]}", interval]
    cells += [str(item["n"]), str(len(item["seeds"])), item["judge"]]
    return "| " + " | ".join(map(_text, cells)) + " |"


def _category_line(item: Mapping[str, Any]) -> str:
    unit = item["unit"]
    interval = f"{number(item['low'], unit)} to {number(item['high'], unit)}"
    cells = [item["category"], item["attack"], item["metric"].replace("_", " ")]
    cells += [f"{number(item['value'], unit)}{_UNIT[unit]}", interval, str(item["n"])]
    return "| " + " | ".join(map(_text, cells)) + " |"


def with_section(readme: str, section: str) -> str:
    """The model card with the section in it: in place of an earlier one, else at the end. Nothing else changes.

    Errors: ValueError for markers that do not come as one pair, the beginning first.
    """
    begins, ends = readme.count(BEGIN), readme.count(END)
    if (begins, ends) == (0, 0):
        return readme.rstrip("\n") + "\n\n" + section + "\n"
    if (begins, ends) != (1, 1) or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"{README}: the markers of the safety card are not one pair; mend or remove them by hand")
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: section, readme, flags=re.DOTALL)


def write_card(folder: Path, card: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `safety.json` and the section into the folder's `README.md`, whose metadata and text stay as they are.

    Errors: ValueError for damaged markers, before anything is written.
    """
    readme = folder / README
    before = readme.read_bytes().decode("utf-8") if readme.is_file() else _NEW
    after = with_section(before, card_section(card))
    (folder / CARD).write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
    readme.write_bytes(after.encode("utf-8"))
    return folder / CARD, readme
