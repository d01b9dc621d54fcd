"""Intervals for the numbers in a report.

Shape suffixes: R observations (rows), P positions. Seeds make every interval repeatable.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

_CELLS = 2_000_000  # numbers held at once while resampling; only memory depends on it


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate.

    Errors: ValueError when n is 0 or there are more successes than trials.
    Source: Wilson 1927, as implemented by scipy.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


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
