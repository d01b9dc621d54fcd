"""Seeds as clusters: what was trained anew is the unit of observation, the prompts asked of it are not.

Which interval for how many seeds: one seed has none across seeds. From two to nine seeds, Student's t interval on the
means of the seeds. From ten on, a bootstrap that draws whole seeds. The two differ most where seeds are few: three
seeds can be drawn with replacement in only ten different ways, the spread of such draws is sqrt(2/3) of the sample's,
and its percentiles are those of a normal distribution at best, so that the bootstrap of three seeds covers the truth
about three times in four where it says 95 % (a test counts it); t takes 4.30 standard errors there and covers it.

Shape suffixes: S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t

from safeshape.stats.intervals import bootstrap, wilson_of_rate

BOOTSTRAP_FROM = 10  # seeds


@dataclass(frozen=True, kw_only=True)
class SeedInterval:
    """The mean over seeds with its 95 % interval. `method` says in words how it was found."""

    value: float
    low: float
    high: float
    seeds: int
    method: str


def t_interval(means_S: ArrayLike) -> tuple[float, float]:
    """Student's 95 % interval of the mean over seeds. Errors: ValueError for fewer than two seeds."""
    means = np.asarray(means_S, dtype=float)
    if means.ndim != 1 or len(means) < 2:
        raise ValueError(f"an interval across seeds needs at least two of them, got {means.size}")
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5)
    return float(means.mean()) - half, float(means.mean()) + half


def cluster_bootstrap(groups: Sequence[ArrayLike], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of all observations; whole groups (seeds) are drawn with replacement.

    Groups of different sizes weigh by their size. Errors: ValueError for fewer than two groups or an empty one.
    """
    arrays = [np.asarray(group, dtype=float) for group in groups]
    if len(arrays) < 2:
        raise ValueError(f"an interval across seeds needs at least two of them, got {len(arrays)}")
    if any(len(array) == 0 for array in arrays):
        raise ValueError("a seed has no observations")
    sums_S, sizes_S = np.array([array.sum() for array in arrays]), np.array([len(array) for array in arrays])

    def mean(drawn: NDArray[np.int64]) -> float:
        return float(sums_S[drawn].sum() / sizes_S[drawn].sum())

    return bootstrap(mean, np.arange(len(arrays)), resamples=resamples, seed=seed)


def across_seeds(rates: Sequence[float], sizes: Sequence[int], *, resamples: int = 2000, seed: int = 0) -> SeedInterval:
    """The mean of rates over seeds, each with its number of prompts, and the interval that suits their number.

    Seeds often share their prompts, and then their spread says nothing about other prompts: three seeds without a
    single success have a t interval of width zero. So the interval is never narrower than Wilson's of the mean rate
    over the prompts of one seed (the smallest); it lies in [0, 1].
    Errors: ValueError for lists of different lengths, no seed, or a rate outside [0, 1].
    """
    if len(rates) != len(sizes) or not rates:
        raise ValueError(f"every seed needs a rate and its n, got {len(rates)} rates and {len(sizes)} n")
    value = float(np.mean(rates))
    low, high = wilson_of_rate(value, min(sizes))
    method = "Wilson over the prompts of one seed"
    if len(rates) >= BOOTSTRAP_FROM:
        # Every seed weighs the same here, as in the mean; its prompts are not drawn again.
        spread = cluster_bootstrap([[rate] for rate in rates], resamples=resamples, seed=seed)
        method = f"bootstrap of {len(rates)} seeds, at least Wilson over the prompts of one"
    elif len(rates) > 1:
        spread = t_interval(rates)
        method = f"t over {len(rates)} seeds, at least Wilson over the prompts of one"
    else:
        spread = (low, high)
    low, high = max(0.0, min(low, spread[0])), min(1.0, max(high, spread[1]))
    return SeedInterval(value=value, low=low, high=high, seeds=len(rates), method=method)
