"""What the papers printed beside what the world shows: which orderings agree, which do not.

An ordering is a pair of conditions of one table. In the paper it counts where the two numbers differ by more than the
95 % noise of their prompts; in the world it is decided where the interval of the difference leaves out zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from safeshape.bench.matrix import Cell
from safeshape.stats import across_seeds, t_interval
from safeshape.stats.comparisons import newcombe
from safeshape.store import canonical

METRIC = "attack_success"
Verdict = Literal["agrees", "disagrees", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Attack success of one condition in the world: the rate of every seed, and n prompts a seed."""

    rates: Mapping[int, float]
    n: int


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Two conditions, the safer one in the paper first, and whether the world agrees.

    `difference`: attack success in the world of the second minus the first, with its 95 % interval.
    """

    safer: str
    riskier: str
    difference: float
    low: float
    high: float
    verdict: Verdict


def flat(cell: Cell) -> dict[str, Any]:
    """A cell's fields by dotted names: `attack.ratio`, `settings.chunk`; lists and mappings as text, to be compared."""
    found: dict[str, Any] = {"model": cell.model, "seed": cell.seed}
    for name, fields in (("attack", cell.attack), ("defence", cell.defence), ("settings", cell.settings)):
        for key, value in fields.items():
            found[f"{name}.{key}"] = canonical(value).decode() if isinstance(value, dict | list) else value
    return found


def measured(
    cells: Sequence[Cell],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    where: Mapping[str, Any],
    metric: str = METRIC,
) -> Measured | None:
    """Attack success by seed of the cells that match and are done; None where there are none.

    Errors: ValueError when two cells of one seed match, so that the condition is not one.
    """
    rates: dict[int, float] = {}
    sizes: list[int] = []
    for cell in cells:
        fields = flat(cell)
        if cell.key() not in rows or any(fields.get(key) != value for key, value in where.items()):
            continue
        if cell.seed in rates:
            raise ValueError(f"two cells with seed {cell.seed} match {dict(where)}")
        for row in rows[cell.key()]:
            if row["metric"] == metric:
                rates[cell.seed] = row["value"]
                sizes.append(row["n"])
    return Measured(rates=rates, n=min(sizes)) if rates else None


def difference(first: Measured, second: Measured) -> tuple[float, float, float]:
    """Mean attack success of the second minus the first, with its 95 % interval.

    Seeds are paired where both have them; the interval is never narrower than Newcombe's for the prompts of one seed,
    because all seeds are asked the same prompts.
    """
    means = [sum(m.rates.values()) / len(m.rates) for m in (first, second)]
    low, high = newcombe(means[0], first.n, means[1], second.n)
    both = [seed for seed in first.rates if seed in second.rates]
    if len(both) > 1:
        spread = t_interval([second.rates[seed] - first.rates[seed] for seed in both])
        low, high = min(low, spread[0]), max(high, spread[1])
    return means[1] - means[0], max(low, -1.0), min(high, 1.0)


def orderings(table: Mapping[str, Any], found: Mapping[Any, Measured]) -> list[Ordering]:
    """Every pair of conditions that the paper orders and the world has, with the world's verdict."""
    sign = -1 if table["higher"] == "safer" else 1
    kept = []
    for (a, x), (b, y) in combinations(table["values"].items(), 2):
        noise = 1.96 * sum(v / 100 * (1 - v / 100) / table["prompts"] for v in (x, y)) ** 0.5
        if a not in found or b not in found or abs(x - y) / 100 <= noise:
            continue
        safer, riskier = (a, b) if sign * (y - x) > 0 else (b, a)
        value, low, high = difference(found[safer], found[riskier])
        kept.append(
            Ordering(
                safer=str(safer),
                riskier=str(riskier),
                difference=value,
                low=low,
                high=high,
                verdict=_verdict(low, high),
            )
        )
    return kept


def _verdict(low: float, high: float) -> Verdict:
    return "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"


def conditions(
    table: Mapping[str, Any], cells: Sequence[Cell], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[Any, Measured]:
    """The world's side of a table, by the values of its axis that have cells."""
    found = {}
    for value in table["values"]:
        where = {**table.get("where", {}), table["axis"]: value}
        one = measured(cells, rows, where, table.get("metric", METRIC))
        if one is not None:
            found[value] = one
    return found


def claimed(
    claim: Mapping[str, Any], cells: Sequence[Cell], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, Ordering]]:
    """The claim's two sides wherever all their other fields are the same, with those fields in words."""
    groups: dict[tuple[tuple[str, Any], ...], None] = {}
    own = {*claim["less"], *claim["more"], "seed"}
    for cell in cells:
        fields = flat(cell)
        rest = tuple(sorted((k, v) for k, v in fields.items() if k not in own and not k.startswith("defence.")))
        groups[(*rest, *(() if "defence.name" in own else (("defence.name", fields["defence.name"]),)))] = None
    kept = []
    for group in groups:
        less, more = (measured(cells, rows, {**dict(group), **claim[side]}) for side in ("less", "more"))
        if less is None or more is None:
            continue
        value, low, high = difference(less, more)
        names = [", ".join(str(v) for v in claim[side].values()) for side in ("less", "more")]
        shown = Ordering(
            safer=names[0], riskier=names[1], difference=value, low=low, high=high, verdict=_verdict(low, high)
        )
        kept.append((_varying(group, groups), shown))
    return kept


def _varying(group: tuple[tuple[str, Any], ...], groups: Mapping[tuple[tuple[str, Any], ...], None]) -> str:
    """The fields of a group in which the groups differ, in words."""
    values: dict[str, set[str]] = {}
    for other in groups:
        for key, value in other:
            values.setdefault(key, set()).add(str(value))
    return ", ".join(f"{key} {value}" for key, value in group if len(values[key]) > 1)


def shown_rate(found: Measured | None) -> str:
    """Attack success in percent with its interval and the number of seeds, or a dash."""
    if found is None:
        return "-"
    one = across_seeds(list(found.rates.values()), [found.n] * len(found.rates))
    return f"{100 * one.value:.1f} ({100 * one.low:.1f}-{100 * one.high:.1f}, {one.seeds} x {found.n})"
