"""What each layer knows, what pooling adds, and where in the prompt the probe's verdict comes from.

Shape suffixes: B prompts, L tokens, D layers, H hidden size, R scored prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from safeshape.signals.probes.choosing import Bank, Choice
from safeshape.signals.probes.features import LAYER_POOLINGS
from safeshape.signals.probes.fitting import Floats, Linear, fit_linear
from safeshape.signals.probes.folds import Fold, Labels
from safeshape.signals.probes.reading import Prompt, Reader, batch_of, taps, token_ids
from safeshape.signals.reliability import auroc
from safeshape.stats import bootstrap

SWEEP_C = 0.01  # one strength for all, so that layers and not strengths are compared
PARTS = 10  # of a prompt, in the attribution


def sweep(bank: Bank, labels: Labels, split: Fold, folds: Sequence[Fold], *, seed: int = 0) -> dict[str, Any]:
    """AUROC of every layer and of every pooling of all layers, in distribution and on left-out groups.

    `in_distribution`: on the split's held-out rows. `left_out`: the mean AUROC over folds whose groups of both labels
    were not fitted on. Intervals resample prompts within folds and labels; they hold layer by layer.
    """
    found: dict[str, Any] = {"C": SWEEP_C, "layers": [], "poolings": []}
    for pooling in bank.poolings:
        for layer in bank.places:
            choice = Choice(pooling=pooling, layers=(layer,))
            values = {"in_distribution": (split,), "left_out": tuple(folds)}
            entry = {name: _auroc(bank, labels, some, choice, seed) for name, some in values.items()}
            found["layers"].append({"pooling": pooling, "layer": layer, **entry})
        for layer_pooling in LAYER_POOLINGS:
            choice = Choice(pooling=pooling, layers=bank.places, layer_pooling=layer_pooling)
            entry = {name: _auroc(bank, labels, some, choice, seed) for name, some in values.items()}
            found["poolings"].append({"pooling": pooling, "layer_pooling": layer_pooling, **entry})
    return found


def _auroc(bank: Bank, labels: Labels, folds: Sequence[Fold], choice: Choice, seed: int) -> dict[str, float]:
    logits = []
    for fold in folds:
        x, layers = bank.take(choice, fold.fit), len(choice.layers)
        linear = fit_linear(
            x, labels[fold.fit], C=SWEEP_C, layer_pooling=choice.layer_pooling, layers=layers, seed=seed
        )
        logits.append(linear.logits(bank.take(choice, fold.held_out)))
    low, high = fold_interval(logits, [labels[fold.held_out] for fold in folds], seed)
    value = np.mean([auroc(-one, labels[fold.held_out]) for one, fold in zip(logits, folds, strict=True)])
    return {"value": float(value), "low": low, "high": high}


def fold_interval(logits: Sequence[Floats], labels: Sequence[Labels], seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of the mean AUROC over folds; prompts are resampled within folds and labels."""
    groups = [np.flatnonzero(labels_R == kind) for labels_R in labels for kind in (True, False)]

    def statistic(*drawn: Any) -> float:
        values = []
        for place, (logits_R, labels_R) in enumerate(zip(logits, labels, strict=True)):
            rows = np.concatenate(drawn[2 * place : 2 * place + 2])
            values.append(auroc(-logits_R[rows], labels_R[rows]))
        return float(np.mean(values))

    return bootstrap(statistic, *groups, resamples=300, seed=seed)


def attribution(
    prompts: Sequence[Prompt],
    reader: Reader,
    linear: Linear,
    mean_DH: Floats,
    *,
    layers: Sequence[int],
) -> list[Floats]:
    """For each prompt, what every layer and token adds to the log odds of harm, an array (D, L).

    For a probe on the mean over tokens and layers side by side: entry (d, t) is (x_td - mean_d) . w_d / L. They add up
    to the prompt's log odds minus those of the mean prompt, exactly. Only one number a token and layer is kept.
    """
    weight_DH = torch.from_numpy(linear.weight_F.reshape(len(layers), -1))
    shift_D = (linear.weight_F.reshape(len(layers), -1).astype(np.float64) * mean_DH).sum(1)
    found = []
    for ids in token_ids(prompts, reader):
        inputs, _ = batch_of([ids], reader)
        parts: dict[int, Floats] = {}

        def take(layer: int, states_BLH: torch.Tensor, parts: dict[int, Floats] = parts) -> None:
            place = list(layers).index(layer)
            product = states_BLH[0].float().cpu() @ weight_DH[place]
            parts[place] = (product.double().numpy() - shift_D[place]) / len(product)

        with torch.inference_mode(), taps(reader, layers, take):
            last_BLH = reader.model(**inputs).last_hidden_state
            if reader.depth - 1 in layers:
                take(reader.depth - 1, last_BLH)
        found.append(np.stack([parts[place] for place in range(len(layers))]))
    return found


def by_parts(each: Sequence[Floats], parts: int = PARTS) -> Floats:
    """The mean over prompts of what every layer adds in each tenth of the prompt, (D, parts).

    A token that lies in two tenths is shared between them by its length there, so that the sum stays the same.
    """
    found = []
    for values_DL in each:
        length = values_DL.shape[1]
        edges = np.linspace(0, length, parts + 1)
        running = np.concatenate([np.zeros((len(values_DL), 1)), values_DL.cumsum(1)], axis=1)
        at = np.stack([np.interp(edges, np.arange(length + 1), row) for row in running])
        found.append(np.diff(at, axis=1))
    mean: Floats = np.mean(found, axis=0)
    return mean
