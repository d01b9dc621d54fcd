"""Intervals, paired tests, seeds as clusters, corrections and agreement for the numbers in a report."""

from safeshape.stats.agreement import Agreement, cohen_kappa
from safeshape.stats.comparisons import (
    Comparison,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_comparison,
    two_proportions,
    unpaired_comparison,
)
from safeshape.stats.intervals import bootstrap, bounded_mean, exact, mean_band, wilson, wilson_of_rate
from safeshape.stats.seeds import SeedInterval, across_seeds, cluster_bootstrap, t_interval

__all__ = [
    "Agreement",
    "Comparison",
    "SeedInterval",
    "across_seeds",
    "bootstrap",
    "bounded_mean",
    "cluster_bootstrap",
    "cohen_kappa",
    "exact",
    "holm",
    "mcnemar",
    "mean_band",
    "paired_bootstrap",
    "paired_comparison",
    "t_interval",
    "two_proportions",
    "unpaired_comparison",
    "wilson",
    "wilson_of_rate",
]
