"""Calibration: a temperature and a conformal threshold that turn a guard's scores into ones that can be relied on.

The temperature makes p_safe mean what it says; it never changes the order of scores. The threshold, an order statistic
of unsafe answers, bounds the share of unsafe answers that pass. Both belong to one guard, asked in one way.
Shape suffix: R scores.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import beta

from safeshape.data import checked_p_safe
from safeshape.signals.scored import By
from safeshape.types import Score

# Guards compute sigmoids in float32, which reaches 1 at a logit of about 17: beyond this, a score is only "saturated".
RESOLUTION = 2.0**-24
TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted, on what, and for whom.

    `threshold`: on calibrated scores; an answer is flagged when its score (`by`: its last or its lowest) is at or below
    it. `alpha`: the wanted false-negative rate. `n`, `n_unsafe`: answers it was fitted on. `false_negative_upper`: with
    95 % confidence over calibration sets, the rate that this threshold stays below. `scorer`: the identity of the
    scores it is for. `data_sha256`: of the labelled data. `figures`: how it did on held-out rows; not part of its hash.
    """

    temperature: float
    threshold: float
    alpha: float
    by: By
    n: int
    n_unsafe: int
    false_negative_upper: float
    scorer: Mapping[str, Any]
    data_sha256: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The hash of all but the figures: it stands in the identity of scores that were calibrated."""
        content = {name: value for name, value in asdict(self).items() if name != "figures"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def apply(self, p_safe: float) -> float:
        """The calibrated score."""
        return float(scale(np.array(p_safe), self.temperature))

    def flags(self, calibrated_p_safe: float) -> bool:
        """Whether the threshold calls an answer with this calibrated score unsafe."""
        return calibrated_p_safe <= self.threshold

    def guarantee(self) -> str:
        """What the threshold promises, in one paragraph."""
        return (
            f"Of new unsafe answers drawn like the {self.n_unsafe} it was fitted on (exchangeable with them), at most "
            f"{self.alpha:.3g} are expected to pass unflagged, with {_SUMMARY[self.by]} above {self.threshold:.4g} "
            f"after calibration. This is an average over calibration sets; with this one the rate is below "
            f"{self.false_negative_upper:.3g} with 95 % confidence. It holds for no other data, guard or chunking, and "
            "copies of one row count as one."
        )

    def check(self, scorer: Mapping[str, Any]) -> None:
        """Errors: ValueError when scores of this identity are not the ones it was fitted for."""
        if "calibration" in scorer:
            raise ValueError("the scores are calibrated already; calibrate what the guard itself gave")
        then, now = identity(self.scorer), identity(scorer)
        for name in [*then, *(name for name in now if name not in then)]:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"the calibration is for scores with {name} {then.get(name)!r}, these have {now.get(name)!r}"
                )

    def save(self, path: Path) -> None:
        """Write it as JSON, with its hash."""
        path.write_text(json.dumps({**asdict(self), "sha256": self.sha256}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote. Errors: ValueError that names the file and field."""
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read the calibration {path}: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a calibration: it must hold a JSON object")
        wanted = content.pop("sha256", None)
        try:
            found = cls(**content)
        except TypeError as error:
            raise ValueError(f"{path} is not a calibration: {str(error).partition(') ')[2] or error}") from error
        checked_p_safe(found.alpha, f"{path}: alpha")
        checked_p_safe(found.threshold, f"{path}: threshold")
        if isinstance(found.temperature, bool) or not isinstance(found.temperature, int | float):
            raise ValueError(f"{path}: temperature must be a number, got {found.temperature!r}")
        if not TEMPERATURES[0] <= found.temperature <= TEMPERATURES[1]:
            raise ValueError(f"{path}: temperature must lie within {TEMPERATURES}, got {found.temperature}")
        if found.by not in _SUMMARY or not isinstance(found.scorer, dict):
            raise ValueError(f"{path}: by must be last or min, and scorer a mapping")
        if wanted != found.sha256:
            raise ValueError(f"{path} was changed after it was written: its sha256 does not fit")
        return found


_SUMMARY: dict[str, str] = {"last": "their last score", "min": "their lowest score"}


def identity(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's identity without what storage changes: absent fields come back from Arrow as None, tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in sorted(value.items()) if inner is not None}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    found: dict[str, Any] = plain(scorer)
    return found


def scale(p_safe_R: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """sigmoid(logit(p_safe) / temperature), of any shape.

    Scores are first held within [2**-24, 1 - 2**-24]: a saturated float32 sigmoid has lost its logit.
    Source: Guo et al. 2017, arXiv 1706.04599, eq. 9, for two classes.
    """
    clipped_R = np.clip(np.asarray(p_safe_R, dtype=np.float64), RESOLUTION, 1 - RESOLUTION)
    found: NDArray[np.float64] = expit(logit(clipped_R) / temperature)
    return found


def fit_temperature(p_safe_R: NDArray[np.float64], unsafe_R: NDArray[np.bool_]) -> float | None:
    """The temperature of the highest likelihood; None where the labels are perfectly separated at 0.5.

    Then colder is always likelier and the data say nothing about a temperature.
    Errors: ValueError without both kinds of labels, or when no temperature beats calling everything 0.5, as with labels
    the wrong way round.
    Source: Guo et al. 2017. The likelihood is convex in 1 / temperature, so the bounded search finds its one minimum.
    """
    if unsafe_R.all() or not unsafe_R.any():
        raise ValueError("calibration needs safe and unsafe labels")
    logits_R = logit(np.clip(p_safe_R, RESOLUTION, 1 - RESOLUTION))
    signed_R = np.where(unsafe_R, -logits_R, logits_R)  # positive where the score is on the label's side

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signed_R / math.exp(log_temperature)).mean())

    if signed_R.sum() <= 0:  # the slope of the likelihood at 1 / temperature = 0
        raise ValueError("the scores do not follow the labels at any temperature; is true the label of unsafe answers?")
    if (signed_R >= 0).all():
        return None
    bounds = (math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x)


def conformal_rank(n_unsafe: int, alpha: float) -> int:
    """Which of the sorted unsafe scores is the threshold, counted from 1: ceil((n + 1)(1 - alpha)).

    Errors: ValueError when alpha is not between 0 and 1, or n is below 1 / alpha - 1, where no threshold can do it.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    exact = Fraction(repr(alpha))  # the decimal that was written: 20 * (1 - 0.05) is 19, not a float beside it
    rank = math.ceil((n_unsafe + 1) * (1 - exact))
    if rank > n_unsafe:
        raise ValueError(
            f"a false-negative rate of {alpha} needs at least {math.ceil(1 / exact) - 1} unsafe rows to calibrate on, "
            f"there are {n_unsafe}"
        )
    return rank


def conformal_threshold(unsafe_p_safe_R: NDArray[np.float64], alpha: float) -> float:
    """A threshold that a new unsafe answer exceeds with probability at most alpha.

    Flag what is at or below it. The probability is over exchangeable calibration and new unsafe answers; ties only
    lower it, and so does any order-keeping map such as a temperature, even one fitted on the same rows.
    Errors: as `conformal_rank`.
    Source: split conformal prediction, Vovk et al. 2005; Angelopoulos and Bates, arXiv 2107.07511, section 1.
    """
    return float(np.sort(unsafe_p_safe_R)[conformal_rank(len(unsafe_p_safe_R), alpha) - 1])


def false_negative_upper(n_unsafe: int, alpha: float) -> float:
    """The 95 % quantile, over calibration sets, of the false-negative rate of the threshold.

    Given the set, the rate of the k-th of n order statistics is Beta(n + 1 - k, k) for continuous scores.
    Source: Vovk 2012, arXiv 1209.2673, as in Angelopoulos and Bates, section 3.2.
    """
    rank = conformal_rank(n_unsafe, alpha)
    return float(beta.ppf(0.95, n_unsafe + 1 - rank, rank))


def calibrated(scores: Iterable[Score], calibration: Calibration) -> Iterator[Score]:
    """The scores, every p_safe mapped, with the calibration's hash in their scorer's identity; failures stay failures.

    Errors: ValueError that names the row whose scorer is not the one it was fitted for, or is calibrated already.
    """
    for index, score in enumerate(scores):
        try:
            calibration.check(score.scorer)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        yield replace(
            score,
            p_safe=None if score.p_safe is None else calibration.apply(score.p_safe),
            spans=tuple(replace(span, p_safe=calibration.apply(span.p_safe)) for span in score.spans),
            scorer={**score.scorer, "calibration": calibration.sha256},
        )
