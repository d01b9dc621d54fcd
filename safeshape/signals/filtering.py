"""Filtering a scored dataset without training: drop answers that fall below a score, or keep their safe beginning."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from safeshape.signals.calibration import Calibration, calibrated
from safeshape.signals.scored import By, cut, safe_spans, scored, summary

Outcome = Literal["kept", "cut", "dropped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What to keep.

    `drop_below`: drop an answer whose score (`by`: its lowest or its last) is below. `keep_prefix`: cut an answer
    before the first span below, and drop it when nothing is left. `calibration`: read calibrated scores, and drop an
    answer that its threshold flags. `keep_failed`: whether rows without a score stay.
    """

    drop_below: float | None = None
    by: By = "min"
    keep_prefix: float | None = None
    calibration: Calibration | None = None
    keep_failed: bool = False


def apply_filter(row: Mapping[str, Any], wanted: Filter) -> tuple[Outcome, Mapping[str, Any] | None]:
    """What becomes of a row, and the row that stays: the same, a shorter one, or None.

    A row whose scorer failed is "failed", and stays only where that is wanted. The scores in a row that stays are never
    changed, a calibration only decides with them.
    Errors: ValueError, without the row's number.
    """
    item = scored(row)
    if item.score.p_safe is None:
        return "failed", row if wanted.keep_failed else None
    if wanted.calibration is not None:
        if item.score.scorer.get("calibration") != wanted.calibration.sha256:  # else these are its calibrated scores
            wanted.calibration.check(item.score.scorer)
            item = replace(item, score=next(calibrated([item.score], wanted.calibration)))
        overall = summary(item.score, wanted.calibration.by)
        if overall is not None and wanted.calibration.flags(overall):
            return "dropped", None
    overall = summary(item.score, wanted.by)
    if wanted.drop_below is not None and overall is not None and overall < wanted.drop_below:
        return "dropped", None
    if wanted.keep_prefix is None:
        return "kept", row
    spans = safe_spans(item.score, wanted.keep_prefix)
    if spans == len(item.score.spans or (0,)):
        return "kept", row
    shorter = cut(row, item, spans)
    return ("dropped", None) if shorter is None else ("cut", shorter)
