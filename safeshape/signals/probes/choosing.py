"""Which layers, token pooling, layer pooling and C: chosen inside the training data by groups left out.

An AUROC on known kinds of prompts saturates and does not find the layer that stays calm on unknown ones
(dev/LOG.md). So candidates are compared on groups that they were not fitted on: by their AUROC there and, among those
within 0.005 of the best, by their log loss there, which sees false alarms on an unknown kind of harmless prompt even
where the order of scores is perfect.
Shape suffixes: B prompts, P poolings over tokens, D layers, H hidden size, F features.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from safeshape.signals.probes.features import Features, LayerPooling
from safeshape.signals.probes.fitting import (
    C_GRID,
    Floats,
    Linear,
    Validated,
    calibration_scale,
    cross_validate,
    fit_linear,
)
from safeshape.signals.probes.folds import Fold, Labels, group_folds
from safeshape.signals.probes.reading import Pooling
from safeshape.signals.reliability import auroc

TIE = 0.005  # of AUROC: closer than any interval here tells apart
QUICK_GRID = (0.001, 0.01, 0.1)  # while candidates are compared; the chosen one gets the whole grid


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to make features: token pooling, places of the layers (from 0) and how they are pooled."""

    pooling: Pooling
    layers: tuple[int, ...]
    layer_pooling: LayerPooling = "concat"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A probe's weights with how they came about. `oof_logits`: out of fold, before `scale`; None with a fixed C."""

    choice: Choice
    linear: Linear
    C: float
    scale: float
    oof_logits: Floats | None
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Pooled states of all prompts, (B, P, D, H), from which any choice takes its features."""

    states_BPDH: Features
    poolings: tuple[Pooling, ...]
    places: tuple[int, ...]

    def take(self, choice: Choice, rows: Any = slice(None)) -> Features:
        """Features (B, F) of a choice, its layers side by side."""
        places = [self.places.index(layer) for layer in choice.layers]
        found: Features = self.states_BPDH[rows, self.poolings.index(choice.pooling)][:, places]
        return found.reshape(len(found), -1)


def candidates(bank: Bank) -> list[Choice]:
    """Every layer alone under every pooling over tokens, and the mean of all."""
    found = [Choice(pooling=p, layers=(layer,)) for p in bank.poolings for layer in bank.places]
    if len(bank.places) > 1:
        found += [Choice(pooling=p, layers=bank.places, layer_pooling="mean") for p in bank.poolings]
    return found


def neighbours(bank: Bank, best: Choice) -> list[Choice]:
    """The best layer together with the ones beside it."""
    if len(best.layers) > 1:
        return []
    place = bank.places.index(best.layers[0])
    around = bank.places[max(place - 1, 0) : place + 2]
    return [Choice(pooling=best.pooling, layers=around)] if len(around) > 1 else []


def best_of(tried: Sequence[tuple[Choice, Validated]]) -> Choice:
    """The lowest loss among the choices whose AUROC is within TIE of the highest."""
    most = max(found.auroc for _, found in tried)
    return min(((c, found) for c, found in tried if found.auroc >= most - TIE), key=lambda pair: pair[1].loss)[0]


def choose(
    bank: Bank,
    labels: Labels,
    groups: Sequence[str] | None,
    *,
    rows: Any = slice(None),
    options: Sequence[Choice] | None = None,
    grid: Sequence[float] = C_GRID,
    calibrate: bool = True,
    seed: int = 0,
) -> Fitted:
    """Choose among `options` (by default `candidates` and then `neighbours` of the best), and fit the choice.

    `labels`, `groups`: of `rows` only, so that nothing else can be looked at. A grid of one C and one option chooses
    nothing. `calibrate`: scale the log odds by what out-of-fold ones call for; with groups, by those of rows whose
    group was left out and of rows whose group was not, half and half: a user's prompts are of either sort.
    """
    folds = group_folds(labels, groups, seed=seed)
    mixed = None if groups is None else group_folds(labels, None, seed=seed)
    tried: list[tuple[Choice, Validated]] = []

    def test(choice: Choice, over: Sequence[float], on: Sequence[Fold] = folds) -> Validated:
        x_BF, layers = bank.take(choice, rows), len(choice.layers)
        return cross_validate(x_BF, labels, on, grid=over, layer_pooling=choice.layer_pooling, layers=layers, seed=seed)

    wanted = candidates(bank) if options is None else list(options)
    if len(wanted) > 1 or options is None:
        quick = [C for C in grid if C in QUICK_GRID] or grid
        tried = [(choice, test(choice, quick)) for choice in wanted]
        if options is None:
            tried += [(choice, test(choice, quick)) for choice in neighbours(bank, best_of(tried))]
        wanted = [best_of(tried)]
    choice = wanted[0]
    validated = test(choice, grid)
    x_BF = bank.take(choice, rows)
    linear = fit_linear(
        x_BF, labels, C=validated.C, layer_pooling=choice.layer_pooling, layers=len(choice.layers), seed=seed
    )
    scale = 1.0
    if calibrate:
        known = None if mixed is None else test(choice, (validated.C,), mixed).logits
        scale = calibration_scale(validated.logits, labels, known=known)
    held = [auroc(-validated.logits[fold.held_out], labels[fold.held_out]) for fold in folds]
    report = {
        "folds": len(folds),
        "grouped": groups is not None,
        "held_out_auroc": {"mean": float(np.mean(held)), "each": held},
        "held_out_log_loss": validated.loss,
        "tried": [
            {**asdict(option), "C": found.C, "log_loss": found.loss, "auroc": found.auroc} for option, found in tried
        ],
    }
    return Fitted(
        choice=choice,
        linear=linear.scaled(scale),
        C=validated.C,
        scale=scale,
        oof_logits=validated.logits,
        report=report,
    )
