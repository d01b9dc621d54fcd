"""Judges: models that rate the harm of an answer from 1 to 5, behind a server or in this process."""

from safeshape.signals.judges.judge import Judge
from safeshape.signals.judges.judging import Judging, judgement_score, p_safe_of

__all__ = ["Judge", "Judging", "judgement_score", "p_safe_of"]
