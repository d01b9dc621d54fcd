"""Whether two models differ: on the same prompts, or on different ones; and Holm's correction across a table.

Shape suffixes: P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, binomtest, chi2, fisher_exact

from safeshape.stats.intervals import bootstrap, wilson_of_rate

McNemar = Literal["exact", "midp", "chi2"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Second minus first rate with its 95 % interval, the p-value of "no difference", and how both were found.

    `only_first`, `only_second`: prompts that count in one model only; None where the prompts were not the same.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    test: str
    only_first: int | None = None
    only_second: int | None = None


def _pair(first_P: ArrayLike, second_P: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(first_P, dtype=float), np.asarray(second_P, dtype=float)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"paired outcomes must be two lists of one length, got shapes {first.shape}, {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired outcomes must be finite numbers; leave prompts without a verdict out of both lists")
    return first, second


def paired_bootstrap(
    first_P: ArrayLike, second_P: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of mean(second - first); prompts are resampled, pairs stay together.

    Errors: ValueError for lists of different lengths, fewer than two prompts, or values that are not finite.
    """
    first, second = _pair(first_P, second_P)
    return bootstrap(lambda drawn: float(drawn.mean()), second - first, resamples=resamples, seed=seed)


def mcnemar(first_P: ArrayLike, second_P: ArrayLike, *, method: McNemar = "exact") -> tuple[int, int, float]:
    """McNemar's test: prompts that count in the first model only, in the second only, and the two-sided p-value.

    `method`: "exact", the binomial test of the disagreements; "midp", which takes half the probability of what was
    seen and so is less conservative; "chi2" without continuity correction, for many disagreements.
    Without a disagreement p is 1. Errors: ValueError for outcomes that are not 0 or 1, or an unknown method.
    Source: McNemar 1947; Fagerland, Lydersen and Laake 2013 (mid-p).
    """
    first, second = _pair(first_P, second_P)
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("McNemar's test needs outcomes that are 0 or 1")
    only_first, only_second = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    if method not in ("exact", "midp", "chi2"):
        raise ValueError(f"method must be exact, midp or chi2, got {method!r}")
    n, less = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 0, 0, 1.0
    if method == "chi2":
        return only_first, only_second, float(chi2.sf((only_first - only_second) ** 2 / n, 1))
    p = float(binomtest(less, n, 0.5).pvalue)
    if method == "midp":
        p = min(1.0, 2 * float(binom.cdf(less, n, 0.5)) - float(binom.pmf(less, n, 0.5)))
    return only_first, only_second, p


def paired_comparison(
    first_P: ArrayLike, second_P: ArrayLike, *, method: McNemar = "exact", resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Two models on the same prompts: bootstrap interval of the difference and McNemar's p-value.

    A bootstrap of pairs that never disagree has no width: there, Newcombe's interval for independent rates is given,
    which is the wider one.
    Errors: ValueError as of its two parts.
    """
    first, second = _pair(first_P, second_P)
    only_first, only_second, p = mcnemar(first, second, method=method)
    low, high = paired_bootstrap(first, second, resamples=resamples, seed=seed)
    if only_first + only_second == 0:
        low, high = newcombe(float(first.mean()), len(first), float(second.mean()), len(second))
    return Comparison(
        difference=float((second - first).mean()),
        low=low,
        high=high,
        p_value=p,
        n=len(first),
        test=f"McNemar ({method}), paired bootstrap",
        only_first=only_first,
        only_second=only_second,
    )


def newcombe(first: float, n_first: int, second: float, n_second: int) -> tuple[float, float]:
    """The 95 % interval of second - first for independent rates, from the two Wilson intervals.

    Source: Newcombe 1998, method 10.
    """
    (low_1, high_1), (low_2, high_2) = wilson_of_rate(first, n_first), wilson_of_rate(second, n_second)
    difference = second - first
    below = ((second - low_2) ** 2 + (high_1 - first) ** 2) ** 0.5
    above = ((high_2 - second) ** 2 + (first - low_1) ** 2) ** 0.5
    return max(-1.0, difference - below), min(1.0, difference + above)


def two_proportions(successes_1: int, n_1: int, successes_2: int, n_2: int) -> float:
    """Fisher's exact two-sided p-value of "both rates are equal", for two models on different prompts.

    Errors: ValueError when a rate is none.
    """
    for successes, n in ((successes_1, n_1), (successes_2, n_2)):
        if n < 1 or not 0 <= successes <= n:
            raise ValueError(f"a rate needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    return float(fisher_exact([[successes_1, n_1 - successes_1], [successes_2, n_2 - successes_2]]).pvalue)


def unpaired_comparison(successes_1: int, n_1: int, successes_2: int, n_2: int) -> Comparison:
    """Two models on different prompts, or without their outcomes: Newcombe's interval and Fisher's exact test."""
    p = two_proportions(successes_1, n_1, successes_2, n_2)
    low, high = newcombe(successes_1 / n_1, n_1, successes_2 / n_2, n_2)
    return Comparison(
        difference=successes_2 / n_2 - successes_1 / n_1,
        low=low,
        high=high,
        p_value=p,
        n=n_1 + n_2,
        test="Fisher exact, Newcombe interval",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: rejecting those below a keeps the chance of any false one below a.

    Errors: ValueError for a value outside [0, 1].
    Source: Holm 1979.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"a p-value must lie in [0, 1], got {p}")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
