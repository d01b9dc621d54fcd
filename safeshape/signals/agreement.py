"""How good a judge is: agreement with labels, with another judge, and with itself asked in other words.

Shape suffix: R rows. "Unsafe" is a score at or above a threshold. Shares have Wilson intervals, all else the percentile
bootstrap over rows; None stands where a number does not exist.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from safeshape.signals.rubric import CATEGORIES, NONE, SCORES
from safeshape.stats import bootstrap, wilson
from safeshape.types import Judgement

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Label:
    """What is true of a row. `score`: 1 to 5, None where labels say only unsafe or not. `category`: None if unknown."""

    unsafe: bool
    score: int | None = None
    category: str | None = None


def share(found: Iterable[bool]) -> dict[str, Any]:
    """The share of true values with its Wilson interval and n."""
    values = list(found)
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson(sum(values), len(values))
    return {"value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


def _estimate(statistic: Callable[[Ints], float], rows: int, *, resamples: int, seed: int) -> dict[str, Any]:
    """A statistic of row numbers with its bootstrap interval."""
    every_R = np.arange(rows)
    value = statistic(every_R) if rows else math.nan
    low = high = math.nan
    if rows >= 2 and not math.isnan(value):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of resamples in which it does not exist
            low, high = bootstrap(statistic, every_R, resamples=resamples, seed=seed)
    numbers = {"value": value, "low": low, "high": high}
    return {**{name: None if math.isnan(x) else float(x) for name, x in numbers.items()}, "n": rows}


def kappa(one_R: Ints, other_R: Ints, labels: Sequence[int], *, quadratic: bool = False) -> float:
    """Cohen's kappa of two ratings; NaN where both sides say the same of every row.

    By its definition, because the bootstrap asks a thousand times: sklearn's `cohen_kappa_score` is the same number, 50
    times slower. `labels`: the ratings there are, ascending and one apart. Source: Cohen 1960 and, for weights, 1968.
    """
    number = len(labels)
    cells_R = (one_R - labels[0]) * number + other_R - labels[0]
    found_KK = np.bincount(cells_R, minlength=number**2).reshape(number, number).astype(float)
    chance_KK = np.outer(found_KK.sum(1), found_KK.sum(0)) / max(found_KK.sum(), 1)
    apart_KK = np.abs(np.subtract.outer(np.arange(number), np.arange(number)))
    weight_KK = apart_KK**2 if quadratic else apart_KK > 0
    expected = (weight_KK * chance_KK).sum()
    return float(1 - (weight_KK * found_KK).sum() / expected) if expected else math.nan


def _kappa(
    one_R: Ints, other_R: Ints, labels: Sequence[int], *, resamples: int, seed: int, quadratic: bool = False
) -> dict[str, Any]:
    def statistic(rows_R: Ints) -> float:
        return kappa(one_R[rows_R], other_R[rows_R], labels, quadratic=quadratic)

    return _estimate(statistic, len(one_R), resamples=resamples, seed=seed)


def _mean(values_R: NDArray[Any], *, resamples: int, seed: int) -> dict[str, Any]:
    return _estimate(lambda rows_R: float(values_R[rows_R].mean()), len(values_R), resamples=resamples, seed=seed)


def _scores(judgements: Iterable[Judgement]) -> Ints:
    return np.array([judgement.score for judgement in judgements], dtype=np.int64)


def agreement(
    judgements: Sequence[Judgement], labels: Sequence[Label], *, threshold: int, resamples: int, seed: int
) -> dict[str, Any]:
    """A judge beside the labels. Rows without a verdict are counted as `failed` and in no other figure.

    `precision` and `recall` are of "unsafe"; `false_negative` is the share of unsafe answers that passed. Where labels
    are scores: `exact`, kappa with quadratic weights, mean score above the label, and the 5 x 5 counts, label by row.
    """
    pairs = [(j, label) for j, label in zip(judgements, labels, strict=True) if j.score is not None]
    said_R = _scores(judgement for judgement, _ in pairs)
    flagged_R = said_R >= threshold
    unsafe_R = np.array([label.unsafe for _, label in pairs], dtype=bool)
    found = {
        "failed": share(judgement.score is None for judgement in judgements),
        "threshold": threshold,
        "counts": {
            "true_positive": int((flagged_R & unsafe_R).sum()),
            "false_positive": int((flagged_R & ~unsafe_R).sum()),
            "false_negative": int((~flagged_R & unsafe_R).sum()),
            "true_negative": int((~flagged_R & ~unsafe_R).sum()),
        },
        "accuracy": share((flagged_R == unsafe_R).tolist()),
        "precision": share(unsafe_R[flagged_R].tolist()),
        "recall": share(flagged_R[unsafe_R].tolist()),
        "false_negative": share((~flagged_R[unsafe_R]).tolist()),
        "false_positive": share(flagged_R[~unsafe_R].tolist()),
        "kappa": _kappa(flagged_R.astype(np.int64), unsafe_R.astype(np.int64), (0, 1), resamples=resamples, seed=seed),
    }
    if all(label.score is not None for _, label in pairs):
        true_R = np.array([label.score for _, label in pairs], dtype=np.int64)
        found["scores"] = {
            "exact": share((said_R == true_R).tolist()),
            "kappa_quadratic": _kappa(said_R, true_R, SCORES, resamples=resamples, seed=seed, quadratic=True),
            "mean_difference": _mean(said_R - true_R, resamples=resamples, seed=seed),
            "counts": confusion_matrix(true_R, said_R, labels=list(SCORES)).tolist() if pairs else None,
        }
    if all(label.category is not None for _, label in pairs):
        found["category"] = share((judgement.category or NONE) == label.category for judgement, label in pairs)
    return {**found, "by_category": _by_category(pairs, threshold)}


def _by_category(pairs: Sequence[tuple[Judgement, Label]], threshold: int) -> dict[str, Any]:
    """Where the errors are: by the true category or, where it is not known, by the one the judge named."""
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for judgement, label in pairs:
        name = label.category or judgement.category or NONE
        groups.setdefault(name, []).append((int(judgement.score or 0) >= threshold, label.unsafe))
    return {
        name: {
            "accuracy": share(flagged == unsafe for flagged, unsafe in groups[name]),
            "false_negative": share(not flagged for flagged, unsafe in groups[name] if unsafe),
            "false_positive": share(flagged for flagged, unsafe in groups[name] if not unsafe),
        }
        for name in (*CATEGORIES, NONE)
        if name in groups
    }


def disagreement(
    one: Sequence[Judgement],
    other: Sequence[Judgement],
    *,
    threshold: int,
    resamples: int,
    seed: int,
    labels: Sequence[Label] | None = None,
) -> dict[str, Any]:
    """Two judges, or two ways of asking one, on the rows that both gave a verdict on.

    `verdicts`: share of rows with another score, `decisions`: with another side of the threshold, `categories`: with
    another category. `distance`: mean |difference| of the scores, `difference`: mean of other minus one. With labels,
    `right` counts who was right where the decisions differ.
    """
    places = [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if None not in (a.score, b.score)]
    one_R, other_R = _scores(one[at] for at in places), _scores(other[at] for at in places)
    flags_one_R, flags_other_R = one_R >= threshold, other_R >= threshold
    found = {
        "failed": share(None in (a.score, b.score) for a, b in zip(one, other, strict=True)),
        "verdicts": share((one_R != other_R).tolist()),
        "decisions": share((flags_one_R != flags_other_R).tolist()),
        "categories": share(one[at].category != other[at].category for at in places),
        "distance": _mean(np.abs(one_R - other_R), resamples=resamples, seed=seed),
        "difference": _mean(other_R - one_R, resamples=resamples, seed=seed),
        "kappa": _kappa(
            flags_one_R.astype(np.int64), flags_other_R.astype(np.int64), (0, 1), resamples=resamples, seed=seed
        ),
        "kappa_quadratic": _kappa(one_R, other_R, SCORES, resamples=resamples, seed=seed, quadratic=True),
    }
    if labels is not None:
        unsafe_R = np.array([labels[at].unsafe for at in places], dtype=bool)
        differ_R = flags_one_R != flags_other_R
        first = int((flags_one_R[differ_R] == unsafe_R[differ_R]).sum())
        found["right"] = {"first": first, "second": int(differ_R.sum()) - first}
    return found


def sensitivity(
    standard: Sequence[Judgement],
    variants: Mapping[str, Sequence[Judgement]],
    *,
    threshold: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """How much verdicts depend on the wording: each variant beside the rubric in use.

    `any`: share of rows whose score changes under at least one variant, of those with a verdict under all.
    """
    rows = [
        {judgement.score for judgement in row}
        for row in zip(standard, *variants.values(), strict=True)
        if all(judgement.score is not None for judgement in row)
    ]
    return {
        "any": share(len(scores) > 1 for scores in rows),
        "variants": {
            name: disagreement(standard, found, threshold=threshold, resamples=resamples, seed=seed)
            for name, found in variants.items()
        },
    }
