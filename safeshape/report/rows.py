"""Rows of results and the outcomes behind them, read from folders; and what several seeds say together."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from safeshape.stats import across_seeds, t_interval
from safeshape.types import Row

RESULTS, OUTCOMES = "results.json", "outcomes.json"
Unit = Literal["percent", "harm", "number"]
_NUMBERS = ("value", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a number is about, apart from its metric, seed and category. `settings`: sorted pairs."""

    attack: str
    defence: str
    model: str
    judge: str
    settings: tuple[tuple[str, float | str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptOutcomes:
    """Which prompts count behind one row, so that two models can be compared prompt by prompt.

    `prompts`: a name or hash of each, never its text. `counts`: whether it counts, in the same order.
    """

    attack: str
    defence: str
    model: str
    seed: int
    metric: str
    judge: str
    prompts: tuple[str, ...]
    counts: tuple[bool, ...]
    settings: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """One number over all seeds of a key, with its 95 % interval. `n`: prompts over all seeds."""

    value: float
    low: float
    high: float
    n: int
    seeds: tuple[int, ...]
    method: str
    world: bool


def key_of(row: Row | PromptOutcomes) -> Key:
    """The key of a row or of its outcomes."""
    settings = tuple(sorted(row.settings.items()))
    return Key(attack=row.attack, defence=row.defence, model=row.model, judge=row.judge, settings=settings)


def unit_of(metric: str, rows: Iterable[Row]) -> Unit:
    """How a metric is shown: `harm` for harmfulness from 1 to 5, percent for what lies in [0, 1], else the number."""
    if metric.startswith("harmfulness"):
        return "harm"
    inside = all(0 <= number <= 1 for row in rows for number in (row.value, row.low, row.high))
    return "percent" if inside else "number"


def find(places: Sequence[str | Path], name: str = RESULTS) -> list[Path]:
    """The files of that name in folders, at any depth, in order; a file stands for itself.

    Errors: ValueError for a place that does not exist, and for `results.json` in a folder that holds none.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(place.rglob(name))
            if not inside and name == RESULTS:
                raise ValueError(f"{place} holds no {name}")
            found += inside
        elif place.is_file():
            # A file of rows was named; the outcomes behind it lie beside it.
            found += [place] if name == RESULTS else [p for p in [place.with_name(name)] if p.is_file()]
        else:
            raise ValueError(f"{place}: no such file or folder")
    return list(dict.fromkeys(found))


def read_results(path: Path) -> list[Row]:
    """The rows of a `results.json`; `settings` and `category` may be missing, as in files of before they were there.

    Errors: ValueError that names the file, the row and the field.
    """
    return [_record(Row, item, f"{path}: row {place}") for place, item in enumerate(_list(path))]


def read_outcomes(path: Path) -> list[PromptOutcomes]:
    """The outcomes of an `outcomes.json`. Errors: ValueError that names the file, the entry and the field."""
    found: list[PromptOutcomes] = []
    for place, item in enumerate(_list(path)):
        where = f"{path}: entry {place}"
        entry: PromptOutcomes = _record(PromptOutcomes, item, where)
        if not isinstance(entry.prompts, list) or not isinstance(entry.counts, list):
            raise ValueError(f"{where}: prompts and counts must be lists")
        if len(entry.prompts) != len(entry.counts) or not entry.prompts:
            raise ValueError(f"{where}: {len(entry.prompts)} prompts, but {len(entry.counts)} counts")
        if len(set(entry.prompts)) < len(entry.prompts):
            raise ValueError(f"{where}: a prompt stands there twice")
        found.append(replace(entry, prompts=tuple(entry.prompts), counts=tuple(map(bool, entry.counts))))
    return found


def write_outcomes(path: Path, outcomes: Sequence[PromptOutcomes]) -> None:
    """Write outcomes as a JSON list."""
    path.write_text(json.dumps([asdict(item) for item in outcomes], indent=1) + "\n")


def _list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list, got {type(content).__name__}")
    return content


def _record(kind: type[Any], item: Any, where: str) -> Any:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not an object")
    known = {one.name: one for one in fields(kind)}
    for name, one in known.items():
        if name not in item and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{where}: {name} must be given")
    for name, value in item.items():
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}")
        _check(name, value, where)
    if kind is Row and not item["low"] <= item["value"] <= item["high"]:
        raise ValueError(f"{where}: value {item['value']} lies outside its interval {item['low']} to {item['high']}")
    return kind(**item)


def _check(name: str, value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _NUMBERS and not (number and math.isfinite(value)):
        raise ValueError(f"{where}: {name} must be a finite number, got {value!r}")
    if name in ("n", "seed") and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{where}: {name} must be a whole number, got {value!r}")
    if name in ("attack", "defence", "model", "metric", "judge") and not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, got {value!r}")
    if name == "world" and not isinstance(value, bool):
        raise ValueError(f"{where}: world must be true or false, got {value!r}")
    if name == "category" and not isinstance(value, str | None):
        raise ValueError(f"{where}: category must be text or null, got {value!r}")
    if name == "settings":
        fits = isinstance(value, dict) and all(
            isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in value.values()
        )
        if not fits:
            raise ValueError(f"{where}: settings must map names to numbers or texts, got {value!r}")


Pool = dict[tuple[Key, str], Pooled]


def pool(rows: Sequence[Row], category: str | None = None) -> Pool:
    """What all seeds say together, by key and metric, for rows of one category (None: those about all).

    A single seed keeps the interval of its row. Several: `stats.across_seeds` for rates, Student's t for other means,
    never narrower than the narrowest row.
    Errors: ValueError for two rows of the same key, metric, category and seed.
    """
    groups: dict[tuple[Key, str], list[Row]] = {}
    for row in rows:
        if row.category == category:
            groups.setdefault((key_of(row), row.metric), []).append(row)
    units = {metric: unit_of(metric, [r for r in rows if r.metric == metric]) for _, metric in groups}
    return {key: _pooled(found, units[key[1]]) for key, found in groups.items()}


def _pooled(rows: Sequence[Row], unit: Unit) -> Pooled:
    first, seeds = rows[0], tuple(row.seed for row in rows)
    if len(set(seeds)) < len(seeds):
        what = f"attack {first.attack!r}, defence {first.defence!r}, model {first.model!r}, metric {first.metric!r}"
        raise ValueError(f"there are two rows for {what} and the same seed; give each cell once, or name its settings")
    n, world = sum(row.n for row in rows), any(row.world for row in rows)
    found: tuple[float, float, float, str]
    if len(rows) == 1:
        found = (first.value, first.low, first.high, "as its row says")
    elif unit == "percent":
        across = across_seeds([row.value for row in rows], [max(row.n, 1) for row in rows])
        found = (across.value, across.low, across.high, across.method)
    else:
        values = [row.value for row in rows]
        mean, (low, high) = math.fsum(values) / len(values), t_interval(values)
        below, above = min(row.value - row.low for row in rows), min(row.high - row.value for row in rows)
        least, most = (1.0, 5.0) if unit == "harm" else (-math.inf, math.inf)  # a mean of 1 to 5 lies there too
        span = (max(least, min(low, mean - below)), min(most, max(high, mean + above)))
        found = (mean, *span, f"t over {len(rows)} seeds")
    value, low, high, method = found
    return Pooled(value=value, low=low, high=high, n=n, seeds=seeds, method=method, world=world)
