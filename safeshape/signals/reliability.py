"""How good scores are on labelled answers: discrimination, calibration error, and error rates along the answer.

Safe is the positive class of a score (p_safe), unsafe of a decision: a false negative is an unsafe answer not flagged.
Shape suffixes: R scores, A answers, S spans of one answer, B bins.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from safeshape.signals.calibration import (
    Calibration,
    conformal_threshold,
    false_negative_upper,
    fit_temperature,
    identity,
    scale,
)
from safeshape.signals.scored import By, Scored, place_at, points, scored, summary
from safeshape.stats import bootstrap, wilson
from safeshape.types import Score

Positions = Literal["deciles", "chunks"]
Flag = Callable[[float], bool]
Values = tuple[NDArray[np.float64], NDArray[np.bool_]]
Measure = Callable[[NDArray[np.float64], NDArray[np.bool_]], float]
BINS = 10
DECILES = np.arange(1, 11) / 10


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """An answer with its score and labels. `span_unsafe`: whether the answer read up to each span's end is unsafe."""

    answer: str
    score: Score
    unsafe: bool
    span_unsafe: tuple[bool, ...] | None = None


def labelled(
    rows: Iterable[Mapping[str, Any]], *, label_column: str, span_labels: str | None
) -> tuple[list[Labelled], dict[str, int]]:
    """The labelled answers, and how many rows were left out: `failed` to be scored, or `unlabelled` (label null).

    `label_column`: true or 1 where the answer is unsafe. `span_labels`: a column with a list of booleans, one a span,
    true where the answer read up to the end of that span is unsafe; or of `{"start", "end", "unsafe"}`, character
    ranges, of which a span takes the one that holds its last character.
    Errors: ValueError that names the row.
    """
    found: list[Labelled] = []
    left_out = {"failed": 0, "unlabelled": 0}
    for index, row in enumerate(rows):
        try:
            if label_column not in row:
                raise ValueError(f"has no column {label_column!r}; it has: {', '.join(map(str, row))}")
            item, label = scored(row), row[label_column]
            if item.score.p_safe is None:
                left_out["failed"] += 1
            elif label is None:
                left_out["unlabelled"] += 1
            else:
                spans = None if span_labels is None else _span_labels(row, span_labels, item)
                unsafe = _boolean(label, label_column)
                found.append(Labelled(answer=item.answer, score=item.score, unsafe=unsafe, span_unsafe=spans))
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
    return found, left_out


def _boolean(value: object, name: str) -> bool:
    if value not in (False, True):  # 0 and 1 equal them
        raise ValueError(f"{name} must be true (unsafe) or false, got {value!r}")
    return bool(value)


def _span_labels(row: Mapping[str, Any], column: str, item: Scored) -> tuple[bool, ...]:
    labels, spans = row.get(column), item.score.spans
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        raise ValueError(f"{column} must be a list, got {labels!r}")
    if labels and isinstance(labels[0], Mapping):
        found = []
        for span in spans:
            holding = [label for label in labels if label["start"] < span.end <= label["end"]]
            if len(holding) != 1:
                raise ValueError(f"{column} has {len(holding)} ranges that hold the end of span {span.end}, needs one")
            found.append(_boolean(holding[0]["unsafe"], column))
        return tuple(found)
    if len(labels) != len(spans):
        raise ValueError(f"{column} has {len(labels)} labels for {len(spans)} spans")
    return tuple(_boolean(label, column) for label in labels)


def calibrated_items(items: Sequence[Labelled], calibration: Calibration) -> list[Labelled]:
    """The same answers with calibrated scores."""
    return [
        replace(
            item,
            score=replace(
                item.score,
                p_safe=None if item.score.p_safe is None else calibration.apply(item.score.p_safe),
                spans=tuple(replace(span, p_safe=calibration.apply(span.p_safe)) for span in item.score.spans),
            ),
        )
        for item in items
    ]


def answer_values(item: Labelled, by: By) -> Values:
    """The one score (last or lowest) and label of an answer, arrays of shape (1,)."""
    return np.array([summary(item.score, by)], dtype=np.float64), np.array([item.unsafe])


def span_values(item: Labelled) -> Values:
    """The scores and labels of an answer's spans, arrays of shape (S,)."""
    return np.array([span.p_safe for span in item.score.spans]), np.array(item.span_unsafe or (), dtype=bool)


def pooled(values: Sequence[Values]) -> Values:
    """The scores and labels of many answers, arrays of shape (R,)."""
    return np.concatenate([p_safe for p_safe, _ in values]), np.concatenate([unsafe for _, unsafe in values])


def reliability_bins(
    p_safe_R: NDArray[np.float64], unsafe_R: NDArray[np.bool_], bins: int = BINS
) -> list[dict[str, Any]]:
    """Equal-mass bins of scores: mean p_safe, share that is safe with its Wilson interval, and n.

    The edges are the quantiles of the scores, so equal scores share a bin and a bin may hold more or, left out, none.
    """
    edges = np.quantile(p_safe_R, np.linspace(0, 1, bins + 1)[1:-1])
    place_R = np.searchsorted(edges, p_safe_R)
    found = []
    for place in np.unique(place_R):
        inside_R = place_R == place
        n, safe = int(inside_R.sum()), int((~unsafe_R[inside_R]).sum())
        low, high = wilson(safe, n)
        found.append({"p_safe": float(p_safe_R[inside_R].mean()), "safe": safe / n, "low": low, "high": high, "n": n})
    return found


def calibration_error(p_safe_R: NDArray[np.float64], unsafe_R: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error: mean over scores of |mean p_safe - share safe| of their equal-mass bin.

    Source: Naeini et al. 2015 and, for equal mass, Nixon et al. 2019, arXiv 1904.01685.
    """
    edges = np.quantile(p_safe_R, np.linspace(0, 1, bins + 1)[1:-1])
    gap_B = np.bincount(np.searchsorted(edges, p_safe_R), weights=p_safe_R - ~unsafe_R, minlength=bins)
    return float(np.abs(gap_B).sum() / len(p_safe_R))


def quality(values: Sequence[Values], unsafe_A: NDArray[np.bool_], seed: int = 0) -> dict[str, Any]:
    """AUROC and ECE with bootstrap intervals, log loss and bins of the pooled scores of answers.

    Answers are resampled with all their scores, unsafe and safe ones apart. The interval of ECE is the basic one, cut
    off at 0: a resample repeats rows and looks worse calibrated than its source. In simulation it held a true error of
    0.09 in 86 to 95 % of draws, but one of 0 in 51 to 64 % only (the percentile interval: in none). None stands where a
    number does not exist, as AUROC with one kind of label only.
    Errors: ValueError with fewer than two safe or two unsafe answers.
    """
    p_safe_R, unsafe_R = pooled(values)
    length_A = np.array([len(p_safe) for p_safe, _ in values])
    start_A = np.cumsum(length_A) - length_A
    groups = (np.flatnonzero(unsafe_A), np.flatnonzero(~unsafe_A))

    def interval(measure: Measure, method: str) -> dict[str, float | None]:
        def statistic(*resampled: NDArray[np.int64]) -> float:
            drawn = np.concatenate(resampled)
            length = length_A[drawn]
            place_R = np.repeat(start_A[drawn] - (np.cumsum(length) - length), length) + np.arange(length.sum())
            return measure(p_safe_R[place_R], unsafe_R[place_R])

        low, high = bootstrap(statistic, *groups, method=method, seed=seed)
        return {"value": _number(measure(p_safe_R, unsafe_R)), "low": _number(max(low, 0.0)), "high": _number(high)}

    return {
        "n": len(p_safe_R),
        "unsafe": int(unsafe_R.sum()),
        "auroc": interval(auroc, "percentile"),
        "ece": interval(calibration_error, "basic"),
        "log_loss": float(log_loss(~unsafe_R, p_safe_R, labels=[False, True])),
        "bins": reliability_bins(p_safe_R, unsafe_R),
    }


def auroc(p_safe_R: NDArray[np.float64], unsafe_R: NDArray[np.bool_]) -> float:
    """The probability that a safe score is above an unsafe one, ties half; NaN with one kind of label only.

    By ranks (Mann-Whitney), because the bootstrap asks a thousand times: sklearn's is the same number, 20 times slower.
    """
    safe, unsafe = int((~unsafe_R).sum()), int(unsafe_R.sum())
    if not safe or not unsafe:
        return math.nan
    return float((rankdata(p_safe_R)[~unsafe_R].sum() - safe * (safe + 1) / 2) / (safe * unsafe))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def error_rates(pairs: Sequence[tuple[float, bool]], flag: Flag) -> dict[str, Any]:
    """False-negative and false-positive rate of (p_safe, unsafe) pairs with Wilson intervals; None where n is 0."""
    found: dict[str, Any] = {}
    for name, kind in (("false_negative", True), ("false_positive", False)):
        wrong = [flag(p) != unsafe for p, unsafe in pairs if unsafe == kind]
        n = len(wrong)
        low, high = wilson(sum(wrong), n) if n else (None, None)
        found[name] = {"value": sum(wrong) / n if n else None, "low": low, "high": high, "n": n}
    return found


def by_position(items: Sequence[Labelled], positions: Positions, flag: Flag) -> list[dict[str, Any]]:
    """Error rates at every position of the answer; an answer counts at most once at each.

    `deciles`: 10 %, ..., 100 % of the answer's characters; `chunks`: its first, second, ... span. Without span labels
    the label is that of the whole answer, so an answer that turns late counts as missed where it is still harmless.
    """
    pairs: dict[str, list[tuple[float, bool]]] = {}
    for item in items:
        values = points(item.score)
        labels = item.span_unsafe or (item.unsafe,) * len(values)
        if positions == "chunks":
            chosen = {str(index + 1): index for index in range(len(values))}
        else:
            places = place_at(item.score, len(item.answer), DECILES)
            chosen = {f"{at:.0%}": int(place) for at, place in zip(DECILES, places, strict=True)}
        for name, index in chosen.items():
            pairs.setdefault(name, []).append((values[index], labels[index]))
    return [{"position": name, **error_rates(found, flag)} for name, found in pairs.items()]


def measure(
    items: Sequence[Labelled], *, by: By, flag: Flag, positions: Positions = "deciles", seed: int = 0
) -> dict[str, Any]:
    """All figures of scores on labelled answers, as JSON holds them.

    `answers`: quality of one score an answer; `spans`: of all spans, where they have labels; `rates` of the decision on
    whole answers, and `positions`: the same along the answer.
    Errors: ValueError with fewer than two safe or two unsafe answers.
    """
    unsafe_A = np.array([item.unsafe for item in items], dtype=bool)
    values = [answer_values(item, by) for item in items]
    found = {
        "answers": quality(values, unsafe_A, seed),
        "rates": error_rates([(float(p[0]), bool(unsafe[0])) for p, unsafe in values], flag),
        "positions": by_position(items, positions, flag),
    }
    if all(item.span_unsafe is not None for item in items):
        found["spans"] = quality([span_values(item) for item in items], unsafe_A, seed)
    return found


def fit(
    items: Sequence[Labelled], *, alpha: float, by: By, scorer: Mapping[str, Any], data_sha256: str
) -> tuple[Calibration, bool]:
    """A calibration from labelled answers, without figures, and whether a temperature could be fitted (else it is 1).

    The temperature is fitted on spans where they have labels, else on one score an answer; the threshold always on
    answers, because spans of one answer are not exchangeable.
    Errors: ValueError without both kinds of labels, or with too few unsafe answers for alpha.
    """
    values = [answer_values(item, by) for item in items]
    spans = all(item.span_unsafe is not None for item in items)
    temperature = fit_temperature(*pooled([span_values(item) for item in items] if spans else values))
    p_safe_A, unsafe_A = pooled(values)
    used = 1.0 if temperature is None else temperature
    found = Calibration(
        temperature=used,
        threshold=conformal_threshold(scale(p_safe_A[unsafe_A], used), alpha),
        alpha=alpha,
        by=by,
        n=len(items),
        n_unsafe=int(unsafe_A.sum()),
        false_negative_upper=false_negative_upper(int(unsafe_A.sum()), alpha),
        scorer=identity(scorer),
        data_sha256=data_sha256,
    )
    return found, temperature is not None


def split(items: Sequence[Labelled], *, share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Answers to fit on (`share` of them) and answers held out, drawn at random with the same part of each label.

    Errors: ValueError when a label has fewer than one row to fit on or two held out.
    """
    unsafe = [item.unsafe for item in items]
    for name, n in (("unsafe", sum(unsafe)), ("safe", len(unsafe) - sum(unsafe))):
        if round(share * n) < 1 or n - round(share * n) < 2:
            raise ValueError(f"calibration needs {name} rows to fit on and at least two held out; there are {n} in all")
    fitted_on, held_out = train_test_split(list(items), train_size=share, stratify=unsafe, random_state=seed)
    return fitted_on, held_out
