"""Counting, drawing and mixing rows: what every data attack has in common.

A share of a size is rounded to the nearest row, halves up, on the ratio as it is written in decimal (0.07 of 50 is 3.5,
so 4). Poisoned rows are counted first, then safe ones, at most what is left; benign rows are the rest. A pool is put
into an order that depends on the seed and on nothing else, and rows are taken from its front, so with one seed two
attacks draw the same rows, and a larger share draws all rows of a smaller one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from random import Random
from typing import Any

from safeshape.attacks.records import POOLS, Conversation, Poisoned, Pools, sha256_of
from safeshape.attacks.texts import request_of


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows of each sort."""

    poisoned: int
    safe: int
    benign: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of a pool: which, and its messages."""

    pool: str
    index: int
    messages: Conversation


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the poisoned data and the rows of pools it was made from. `facts`: numbers for the report."""

    messages: Conversation
    origin: str
    poisoned: bool
    sources: tuple[Source, ...]
    facts: Mapping[str, Any] | None = None


def counts_of(size: int, ratio: float, safe_ratio: float = 0.0) -> Counts:
    """How many rows of each sort a data set has; see the file's top for the rounding.

    Errors: ValueError for a size below 1, a ratio out of range, ratios that add up to more than 1, or a ratio above 0
    that is less than half a row.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    share, safe_share = check_ratio("ratio", ratio), check_ratio("safe_ratio", safe_ratio)
    if share + safe_share > 1:
        raise ValueError(f"ratio and safe_ratio together must be at most 1, got {ratio} and {safe_ratio}")
    poisoned, safe = _rounded(share * size), _rounded(safe_share * size)
    for name, wanted, count in (("ratio", ratio, poisoned), ("safe_ratio", safe_ratio, safe)):
        if wanted and not count:
            raise ValueError(f"{name} {wanted} of {size} rows is less than half a row")
    left = size - poisoned
    safe = left if share + safe_share == 1 else min(safe, left)
    return Counts(poisoned=poisoned, safe=safe, benign=left - safe)


def check_ratio(name: str, value: float) -> Decimal:
    """The ratio as it is written in decimal. Errors: ValueError out of [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return Decimal(str(value))


def _rounded(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_HALF_UP))


def plan(
    pools: Pools,
    size: int | None,
    *,
    ratio: float,
    safe_ratio: float = 0.0,
    poison_pool: str = "harmful",
    carriers: int = 0,
) -> Counts:
    """The counts for a size that the pools can give, or for the largest one that they can where `size` is None.

    `poison_pool`: where poisoned rows come from. `carriers`: benign rows that each of them uses up beside.
    Errors: ValueError that names the pool that is missing or too small.
    """
    share, safe_share = check_ratio("ratio", ratio), check_ratio("safe_ratio", safe_ratio)
    asked = {poison_pool: share > 0, "safe": safe_share > 0}
    asked["benign"] = asked.get("benign", False) or share + safe_share < 1 or bool(carriers and share)
    for pool, needed in asked.items():
        _check_pool(pools, pool, int(needed))
    rows = {pool: len(_distinct(pools, pool)) for pool in POOLS}
    if size is None:
        size = _largest(rows, ratio, safe_ratio, poison_pool, carriers)
    counts = counts_of(size, ratio, safe_ratio)
    for pool, count in _needed(counts, poison_pool, carriers).items():
        if count > rows[pool]:
            raise ValueError(f"{count} {pool} rows are needed, but the pool has only {rows[pool]} different ones")
    return counts


def _largest(rows: Mapping[str, int], ratio: float, safe_ratio: float, poison_pool: str, carriers: int) -> int:
    """The largest size that the pools can give; 1 where there is none, which then says why."""
    bounds = [
        int((rows[pool] + 0.5) / share) + 1 for pool, share in ((poison_pool, ratio), ("safe", safe_ratio)) if share
    ]
    for size in range(min([sum(rows.values()), *bounds]), 0, -1):
        try:
            counts = counts_of(size, ratio, safe_ratio)
        except ValueError:  # less than half a row, as in every smaller size
            break
        if all(count <= rows[pool] for pool, count in _needed(counts, poison_pool, carriers).items()):
            return size
    return 1


def _needed(counts: Counts, poison_pool: str, carriers: int) -> Counter[str]:
    needed = Counter({"benign": counts.benign + counts.poisoned * carriers, "safe": counts.safe})
    needed[poison_pool] += counts.poisoned
    return needed


def _check_pool(pools: Pools, pool: str, needed: int) -> None:
    if not needed:
        return
    distinct = len(_distinct(pools, pool))
    if not distinct:
        raise ValueError(f"this attack needs {pool} rows; give a {pool} pool")
    if needed > distinct:
        raise ValueError(f"{needed} {pool} rows are needed, but the pool has only {distinct} different ones")


def _distinct(pools: Pools, pool: str) -> list[Source]:
    """The rows of a pool, those that stand there several times once."""
    found: dict[str, Source] = {}
    rows: Sequence[Conversation] = vars(pools)[pool]
    for index, messages in enumerate(rows):
        found.setdefault(sha256_of(list(messages)), Source(pool=pool, index=index, messages=messages))
    return list(found.values())


def draw(pools: Pools, pool: str, count: int, *, seed: int) -> list[Source]:
    """The first `count` rows of a pool in the order of the seed; no row twice.

    Errors: ValueError when the pool is empty or too small.
    """
    _check_pool(pools, pool, count)
    rows = _distinct(pools, pool)
    Random(f"{pool}/{seed}").shuffle(rows)
    return rows[:count]


def draw_safe(pools: Pools, count: int, harmful: Sequence[Source], *, seed: int, paired: bool) -> list[Source]:
    """Safe rows: first those whose request is among the harmful rows' (`paired`), or first those whose is not."""
    _check_pool(pools, "safe", count)
    asked = {request_of(source.messages).strip() for source in harmful}
    rows = draw(pools, "safe", len(_distinct(pools, "safe")) if count else 0, seed=seed)
    rows.sort(key=lambda source: (request_of(source.messages).strip() in asked) != paired)
    return rows[:count]


def entries_of(sources: Sequence[Source], origin: str, *, poisoned: bool = False) -> list[Entry]:
    """Rows of a pool as they are."""
    return [Entry(messages=s.messages, origin=origin, poisoned=poisoned, sources=(s,)) for s in sources]


def finish(
    attack: str, entries: Sequence[Entry], pools: Pools, *, seed: int, parameters: Mapping[str, Any], **facts: Any
) -> Poisoned:
    """Shuffle the rows and write the report."""
    shuffled = list(entries)
    Random(f"order/{seed}").shuffle(shuffled)
    dataset = [
        {"messages": [dict(m) for m in entry.messages], "origin": entry.origin, "poisoned": entry.poisoned}
        for entry in shuffled
    ]
    drawn: dict[str, list[tuple[int, int]]] = {}
    for row, entry in enumerate(shuffled):
        for source in entry.sources:
            drawn.setdefault(source.pool, []).append((row, source.index))
    report = {
        "attack": attack,
        "seed": seed,
        "parameters": dict(parameters),
        "size": len(dataset),
        "poisoned": sum(entry.poisoned for entry in shuffled),
        "rows_by_origin": dict(sorted(Counter(entry.origin for entry in shuffled).items())),
        "poisoned_rows": [row for row, entry in enumerate(shuffled) if entry.poisoned],
        "drawn": drawn,
        "pools": {
            pool: {
                "rows": len(vars(pools)[pool]),
                "different": len(_distinct(pools, pool)),
                "sha256": sha256_of([list(m) for m in vars(pools)[pool]]),
            }
            for pool in drawn
        },
        "sha256": sha256_of(dataset),
        **facts,
    }
    changed = {row: dict(entry.facts) for row, entry in enumerate(shuffled) if entry.facts is not None}
    return Poisoned(dataset=dataset, report=report | ({"by_row": changed} if changed else {}))
