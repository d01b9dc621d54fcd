"""Cohen's kappa: how far two judges agree beyond chance.

Shape suffixes: C categories.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from safeshape.stats.intervals import Z95, exact

Weighting = Literal["linear", "quadratic"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Kappa with its 95 % interval. `agreement`: the plain share of equal verdicts."""

    kappa: float
    low: float
    high: float
    n: int
    agreement: float
    method: str


def cohen_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    categories: Sequence[Hashable] | None = None,
    weights: Weighting | None = None,
    interval: Literal["asymptotic", "bootstrap"] = "asymptotic",
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Kappa of two lists of verdicts on the same items.

    `categories`: all of them, in their order, which weights need (1 to 5 for a harm scale); default: those that occur,
    sorted. `weights`: "linear" or "quadratic" penalties by distance in that order, None for equal ones.
    `interval`: the asymptotic one of Fleiss, Cohen and Everitt 1969, or a bootstrap over items (the better one for few
    items; it passes over draws where kappa does not exist). Where no verdict differs both have no width; the low end is
    then what the low end of the exact interval of the agreement would give, at the same chance agreement.
    Errors: ValueError for lists of different lengths, fewer than two items, a verdict outside the categories, or one
    and the same verdict everywhere, where kappa does not exist.
    Source: Cohen 1960 and 1968; Fleiss, Cohen and Everitt 1969.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"agreement needs two verdicts on at least two items, got {len(first)} and {len(second)}")
    names = sorted({*first, *second}, key=lambda name: (str(type(name)), name)) if categories is None else categories
    place = {name: index for index, name in enumerate(names)}
    for verdict in (*first, *second):
        if verdict not in place:
            raise ValueError(f"verdict {verdict!r} is not one of the categories {', '.join(map(str, names))}")
    pairs = np.array([[place[a], place[b]] for a, b in zip(first, second, strict=True)])
    kept_CC = 1 - _penalty(len(place), weights)
    counts_CC = _table(pairs, len(place))
    kappa, error = _kappa(counts_CC / len(pairs), kept_CC)
    if np.isnan(kappa):
        raise ValueError("every verdict is the same, so agreement beyond chance does not exist")
    low, high = kappa - Z95 * error / len(pairs) ** 0.5, kappa + Z95 * error / len(pairs) ** 0.5
    if interval == "bootstrap":
        low, high = _drawn(pairs, kept_CC, resamples, seed)
    if kappa > 1 - 1e-12:
        low = _low_of_one(counts_CC, kept_CC)
    return Agreement(
        kappa=kappa,
        low=max(-1.0, low),
        high=min(1.0, high),
        n=len(pairs),
        agreement=float(np.trace(counts_CC) / len(pairs)),
        method=f"{interval}, {weights or 'equal'} weights",
    )


def _penalty(size: int, weights: Weighting | None) -> NDArray[np.float64]:
    distance_CC = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)
    if weights is None:
        return (distance_CC > 0).astype(float)
    if weights not in ("linear", "quadratic"):
        raise ValueError(f"weights must be linear or quadratic, got {weights!r}")
    scaled_CC = distance_CC / max(size - 1, 1)
    return scaled_CC if weights == "linear" else scaled_CC**2


def _table(pairs: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    counts_CC = np.zeros((size, size))
    np.add.at(counts_CC, (pairs[:, 0], pairs[:, 1]), 1)
    return counts_CC


def _kappa(p_CC: NDArray[np.float64], kept_CC: NDArray[np.float64]) -> tuple[float, float]:
    """Kappa and its standard error times sqrt(n); nan where chance agreement is whole. `kept_CC`: 1 minus penalties."""
    row_C, column_C = p_CC.sum(axis=1), p_CC.sum(axis=0)
    seen, chance = float((kept_CC * p_CC).sum()), float((kept_CC * np.outer(row_C, column_C)).sum())
    if 1 - chance < 1e-12:
        return float("nan"), float("nan")
    kappa = (seen - chance) / (1 - chance)
    margins_CC = (kept_CC @ column_C)[:, None] + (kept_CC.T @ row_C)[None, :]
    spread = float((p_CC * (kept_CC - margins_CC * (1 - kappa)) ** 2).sum()) - (kappa - chance * (1 - kappa)) ** 2
    return kappa, float(np.sqrt(max(spread, 0.0))) / (1 - chance)


def _low_of_one(counts_CC: NDArray[np.float64], kept_CC: NDArray[np.float64]) -> float:
    n = int(counts_CC.sum())
    margin_C = counts_CC.sum(axis=0) / n
    chance = float((kept_CC * np.outer(margin_C, margin_C)).sum())
    return (exact(n, n)[0] - chance) / (1 - chance)


def _drawn(pairs: NDArray[np.int64], kept_CC: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float]:
    def statistic(drawn: NDArray[np.int64]) -> float:
        return _kappa(_table(pairs[drawn], len(kept_CC)) / len(drawn), kept_CC)[0]

    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, len(pairs), len(pairs))) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
