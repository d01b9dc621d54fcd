"""What is measured: the probe, and the bag of words that it must beat to claim anything.

Both are given row numbers and nothing else of what they may not see. Shape suffix: B prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from safeshape.signals.probes.choosing import Bank, Choice, Fitted, choose
from safeshape.signals.probes.fitting import Floats, balanced_log_loss, calibration_scale
from safeshape.signals.probes.folds import Fold, Labels, Rows, group_folds

BAG_GRID = (0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a method chose: its features (a probe's) and C. Given back to it, nothing is chosen anew."""

    C: float
    choice: Choice | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Log odds of harm of the rows that were asked for, `raw` before calibration, and how the method was made."""

    logits: Floats
    raw: Floats
    settings: Settings


class Method(Protocol):
    """Fits on some rows, scores others."""

    def run(self, fit: Rows, asked: Rows, settings: Settings | None = None) -> Verdict:
        """Log odds of `asked` from a fit on `fit`. With `settings` only the weights and the scale are fitted."""
        ...


@dataclass(frozen=True, kw_only=True)
class ProbeMethod:
    """The probe on a bank of states; layers, poolings and C chosen by left-out groups of the rows it is fitted on.

    `options`: the choices it has, None for all.
    """

    bank: Bank
    labels: Labels
    groups: Sequence[str]
    options: tuple[Choice, ...] | None = None
    grid: tuple[float, ...]
    seed: int = 0

    def fit(self, fit: Rows, settings: Settings | None = None) -> Fitted:
        """Choose and fit on these rows alone."""
        given = settings is not None and settings.choice is not None
        options = [settings.choice] if settings is not None and settings.choice is not None else self.options
        return choose(
            self.bank,
            self.labels[fit],
            [self.groups[row] for row in fit],
            rows=fit,
            options=options,
            grid=(settings.C,) if given and settings is not None else self.grid,
            seed=self.seed,
        )

    def run(self, fit: Rows, asked: Rows, settings: Settings | None = None) -> Verdict:
        """Fit on some rows and score others."""
        fitted = self.fit(fit, settings)
        logits = fitted.linear.logits(self.bank.take(fitted.choice, asked))
        return Verdict(logits=logits, raw=logits / fitted.scale, settings=Settings(C=fitted.C, choice=fitted.choice))


@dataclass(frozen=True, kw_only=True)
class BagOfWords:
    """Logistic regression on tf-idf of words and pairs of words: what can be known without understanding.

    The same folds, the same choice of C and the same calibration as the probe.
    """

    texts: Sequence[str]
    labels: Labels
    groups: Sequence[str]
    grid: tuple[float, ...] = BAG_GRID
    seed: int = 0

    def run(self, fit: Rows, asked: Rows, settings: Settings | None = None) -> Verdict:
        """Fit on some rows and score others."""
        labels = self.labels[fit]
        folds = group_folds(labels, [self.groups[row] for row in fit], seed=self.seed)
        grid = self.grid if settings is None else (settings.C,)
        found = self._held_out(fit, folds, grid)
        losses = {C: sum(balanced_log_loss(found[C][f.held_out], labels[f.held_out]) for f in folds) for C in grid}
        best = min(grid, key=lambda C: (losses[C], C))
        known = self._held_out(fit, group_folds(labels, None, seed=self.seed), (best,))[best]
        scale = calibration_scale(found[best], labels, known=known)
        words, table = self._table(fit)
        regression = self._regression(best, table, labels)
        raw = regression.decision_function(words.transform([self.texts[row] for row in asked]))
        return Verdict(logits=scale * raw, raw=raw, settings=Settings(C=best))

    def score(self, fit: Rows, asked: Rows) -> Floats:
        """Log odds of `asked` with the first C of the grid, uncalibrated: nothing is chosen."""
        words, table = self._table(fit)
        regression = self._regression(self.grid[0], table, self.labels[fit])
        logits: Floats = regression.decision_function(words.transform([self.texts[row] for row in asked]))
        return logits

    def _held_out(self, fit: Rows, folds: Sequence[Fold], grid: Sequence[float]) -> dict[float, Floats]:
        """For every C the log odds of each row of `fit`, from the fold that did not fit on it."""
        found = {C: np.zeros(len(fit)) for C in grid}
        for fold in folds:
            words, table = self._table(fit[fold.fit])
            held = words.transform([self.texts[row] for row in fit[fold.held_out]])
            for C in grid:
                regression = self._regression(C, table, self.labels[fit[fold.fit]])
                found[C][fold.held_out] = regression.decision_function(held)
        return found

    def _table(self, rows: Rows) -> tuple[Any, Any]:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        return words, words.fit_transform([self.texts[row] for row in rows])

    def _regression(self, C: float, table: Any, labels: Labels) -> Any:
        return LogisticRegression(C=C, max_iter=1000, random_state=self.seed).fit(table, labels)
