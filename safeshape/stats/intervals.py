"""Intervals of one rate or one statistic.

Shape suffixes: R observations (rows), P positions. Seeds make every interval repeatable.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from scipy.stats import bootstrap as scipy_bootstrap

Z95 = float(norm.ppf(0.975))
_CELLS = 2_000_000  # numbers held at once while resampling; only memory depends on it


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate.

    Errors: ValueError when n is 0 or there are more successes than trials.
    Source: Wilson 1927, as implemented by scipy.
    """
    return _proportion(successes, n, "wilson")


def exact(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Clopper-Pearson interval of a rate: it covers the truth at least as often as it says, for every n.

    Wider than Wilson's; for a statement such as "no success in n", where the claim must not be too small.
    Errors: ValueError when n is 0 or there are more successes than trials.
    Source: Clopper and Pearson 1934, as implemented by scipy.
    """
    return _proportion(successes, n, "exact")


def _proportion(successes: int, n: int, method: str) -> tuple[float, float]:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    interval, rate = binomtest(successes, n).proportion_ci(confidence_level=0.95, method=method), successes / n
    # At 0 and 1 rounding may put an end on the wrong side of the rate.
    return min(float(interval.low), rate), max(float(interval.high), rate)


def wilson_of_rate(rate: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval where only the rate is known, which need not be a whole number of n trials.

    Errors: ValueError when n is 0 or the rate lies outside [0, 1].
    """
    if n < 1 or not 0 <= rate <= 1:
        raise ValueError(f"a rate must lie in [0, 1] with n >= 1, got {rate} of n={n}")
    squared = Z95 * Z95 / n
    middle = (rate + squared / 2) / (1 + squared)
    half = Z95 / (1 + squared) * (rate * (1 - rate) / n + squared / (4 * n)) ** 0.5
    # At 0 and 1 rounding may put an end on the wrong side of the rate.
    return min(max(0.0, middle - half), rate), max(min(1.0, middle + half), rate)


def bootstrap(
    statistic: Callable[..., float],
    *groups: NDArray[Any],
    method: str = "percentile",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % bootstrap interval of `statistic(*groups)`; every group is resampled within itself.

    Give row numbers as groups where a row brings several values along. `method`: "percentile", or "basic", which
    mirrors the resampled values at the estimate and so undoes the bias of a statistic that resampling inflates.
    Errors: ValueError for a group of fewer than two observations, which say nothing about their spread.
    Source: Efron and Tibshirani 1993, as implemented by scipy.
    """
    for group in groups:
        if len(group) < 2:
            raise ValueError(f"a bootstrap interval needs at least two observations in every group, got {len(group)}")
    found = scipy_bootstrap(
        groups,
        statistic,
        n_resamples=resamples,
        batch=max(1, _CELLS // max(len(group) for group in groups)),
        vectorized=False,
        confidence_level=0.95,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def bounded_mean(
    values_R: NDArray[np.float64], *, least: float, most: float, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of values that lie in [least, most].

    Equal values resample without any width. Then the ends are the means that the exact interval of "n of n were so"
    leaves room for: the share of others that it allows, all of them at one end of the scale.
    Errors: ValueError for fewer than two values, or one out of range.
    """
    if len(values_R) and not least <= values_R.min() <= values_R.max() <= most:
        raise ValueError(f"values must lie in [{least}, {most}], got {values_R.min()} to {values_R.max()}")
    low, high = bootstrap(lambda drawn: float(drawn.mean()), values_R, resamples=resamples, seed=seed)
    if values_R.min() == values_R.max():
        value, others = float(values_R[0]), 1 - exact(len(values_R), len(values_R))[0]
        return value - others * (value - least), value + others * (most - value)
    return low, high


def mean_band(
    values_RP: NDArray[np.float64], *, resamples: int = 1000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95 % percentile bootstrap band, low and high of shape (P,), of the mean over rows; whole rows are resampled.

    It holds position by position, not for the whole curve at once.
    Errors: ValueError for fewer than two rows.
    """
    rows = len(values_RP)
    if rows < 2:
        raise ValueError(f"a bootstrap band needs at least two rows, got {rows}")
    rng, means, step = np.random.default_rng(seed), [], max(1, _CELLS // rows)
    for done in range(0, resamples, step):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(step, resamples - done))
        means.append(counts @ values_RP / rows)
    low_P, high_P = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low_P, high_P
