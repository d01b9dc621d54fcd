"""A table of all keys and metrics, and comparisons with a baseline.

Every key is compared with the one that differs from it in its defence only. On one seed: McNemar's exact test where the
outcomes of the same prompts are at hand for both, else Fisher's exact test. On several seeds, the units are the seeds:
the p-value is the larger one of a t test over the seeds (paired where both have the same ones) and of the largest
p-value of a single seed, so that seeds which happen to agree cannot make up for few prompts. All p-values of the table
are then corrected together by Holm's method.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import ttest_ind, ttest_rel

from safeshape.report.rows import Key, Pooled, PromptOutcomes, Unit, key_of, pool, unit_of
from safeshape.stats import holm, mcnemar, two_proportions
from safeshape.types import Row

MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
FIELDS = ("attack", "defence", "model", "judge")


@dataclass(frozen=True, kw_only=True)
class Test:
    """A comparison with the baseline: the difference to it, the p-value before and after correction, and which test."""

    difference: float
    p_value: float
    adjusted: float
    test: str

    @property
    def mark(self) -> str:
        """The stars of the corrected p-value."""
        return next((mark for bound, mark in MARKS if self.adjusted < bound), "")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Lines are keys, columns metrics. `labels`: which parts of a key differ between lines, and are shown."""

    keys: tuple[Key, ...]
    metrics: tuple[str, ...]
    units: Mapping[str, Unit]
    cells: Mapping[tuple[Key, str], Pooled]
    tests: Mapping[tuple[Key, str], Test]
    labels: tuple[str, ...]
    baseline: str | None

    @property
    def world(self) -> bool:
        """Whether any number is from the embedded world."""
        return any(cell.world for cell in self.cells.values())


def make_grid(
    rows: Sequence[Row],
    *,
    outcomes: Sequence[PromptOutcomes] = (),
    baseline: str | None = None,
    metrics: Sequence[str] = (),
) -> Grid:
    """The grid of the rows without a category. `baseline`: the defence to compare with; `metrics`: which, in order.

    Errors: ValueError for no rows, an unknown metric or baseline, or two rows of one key, metric and seed.
    """
    plain = [row for row in rows if row.category is None]
    known = list(dict.fromkeys(row.metric for row in plain))
    if not plain:
        raise ValueError("there are no rows to make a table of")
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"no row has the metric {metric!r}; there are: {', '.join(known)}")
    defences = list(dict.fromkeys(row.defence for row in plain))
    if baseline is not None and baseline not in defences:
        raise ValueError(f"no row has the baseline {baseline!r} as its defence; there are: {', '.join(defences)}")
    shown = tuple(metrics) or tuple(known)
    plain = [row for row in plain if row.metric in shown]
    cells = pool(plain)
    keys = tuple(dict.fromkeys(key for key, _ in cells))
    units = {metric: unit_of(metric, [row for row in plain if row.metric == metric]) for metric in shown}
    tests = {} if baseline is None else _tests(plain, outcomes, baseline, units)
    return Grid(
        keys=keys, metrics=shown, units=units, cells=cells, tests=tests, labels=_differing(keys), baseline=baseline
    )


def _differing(keys: Sequence[Key]) -> tuple[str, ...]:
    settings = list(dict.fromkeys(name for key in keys for name, _ in key.settings))
    parts = [*FIELDS, *settings]
    found = [part for part in parts if len({part_of(key, part) for key in keys}) > 1]
    return tuple(found) or ("defence",)


def part_of(key: Key, part: str) -> float | str:
    """A field or a setting of a key; a setting that it does not have is an empty text."""
    return str(vars(key)[part]) if part in FIELDS else dict(key.settings).get(part, "")


def _tests(
    rows: Sequence[Row], outcomes: Sequence[PromptOutcomes], baseline: str, units: Mapping[str, Unit]
) -> dict[tuple[Key, str], Test]:
    by_seed: dict[tuple[Key, str], dict[int, Row]] = {}
    for row in rows:
        by_seed.setdefault((key_of(row), row.metric), {})[row.seed] = row
    prompts = {(key_of(item), item.metric, item.seed): item for item in outcomes}
    for (key, metric, seed), item in prompts.items():
        said = by_seed.get((key, metric), {}).get(seed)
        if said is not None and (said.n != len(item.counts) or abs(said.value * said.n - sum(item.counts)) > 1e-6):
            raise ValueError(
                f"defence {key.defence!r}, metric {metric!r}, seed {seed}: the row says {said.value:g} of {said.n}, "
                f"its outcomes {sum(item.counts)} of {len(item.counts)}"
            )
    found: dict[tuple[Key, str], Test] = {}
    for (key, metric), mine in by_seed.items():
        other = replace(key, defence=baseline)
        theirs = by_seed.get((other, metric))
        if key.defence == baseline or theirs is None:
            continue
        singles = [
            _single(mine[seed], theirs[seed], prompts.get((key, metric, seed)), prompts.get((other, metric, seed)))
            for seed in mine
            if seed in theirs and units[metric] == "percent"
        ]
        test = _over_seeds(mine, theirs, singles)
        if test is not None:
            found[key, metric] = test
    adjusted = holm([test.p_value for test in found.values()])
    return {place: replace(test, adjusted=p) for (place, test), p in zip(found.items(), adjusted, strict=True)}


def _single(
    mine: Row, theirs: Row, mine_by: PromptOutcomes | None, theirs_by: PromptOutcomes | None
) -> tuple[float, str]:
    """The p-value of one seed, and the test."""
    if mine_by is not None and theirs_by is not None and set(mine_by.prompts) == set(theirs_by.prompts):
        counts = dict(zip(theirs_by.prompts, theirs_by.counts, strict=True))
        return mcnemar([counts[prompt] for prompt in mine_by.prompts], mine_by.counts)[2], "McNemar, same prompts"
    k, m = round(mine.value * mine.n), round(theirs.value * theirs.n)
    return two_proportions(m, theirs.n, k, mine.n), "Fisher, prompts taken as different"


def _over_seeds(
    mine: Mapping[int, Row], theirs: Mapping[int, Row], singles: Sequence[tuple[float, str]]
) -> Test | None:
    """None where nothing can be tested: a single seed of something that is not a rate."""
    a, b = [row.value for row in theirs.values()], [row.value for row in mine.values()]
    difference = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    if len(a) == 1 or len(b) == 1:
        if not singles:
            return None
        p, test = max(singles)
        return Test(difference=difference, p_value=p, adjusted=p, test=test)
    same = list(mine) if set(mine) == set(theirs) else []
    if same:
        differences = [mine[seed].value - theirs[seed].value for seed in same]
        spread = max(differences) - min(differences)
        p = float(ttest_rel(b, [theirs[seed].value for seed in same]).pvalue) if spread > 1e-12 else _flat(difference)
    else:
        spread = max(max(a) - min(a), max(b) - min(b))
        p = float(ttest_ind(b, a, equal_var=False).pvalue) if spread > 1e-12 else _flat(difference)
    name = f"t over {len(same)} paired seeds" if same else f"Welch's t over {len(b)} and {len(a)} seeds"
    if singles:
        largest, test = max(singles)
        name, p = f"{name}; {test} in each", max(p, largest)
    elif spread <= 1e-12:
        return None  # seeds without any spread and no test of the prompts say nothing about chance
    return Test(difference=difference, p_value=p, adjusted=p, test=name)


def _flat(difference: float) -> float:
    return 1.0 if abs(difference) < 1e-12 else 0.0
