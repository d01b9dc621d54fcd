"""Fitting: standardised logistic regression, C by cross-validation over left-out groups, one scale for calibration.

Whatever pools the layers, the result is one weight per feature and a bias on raw features, so that scoring is a dot
product. Shape suffixes: B prompts, D layers, H hidden size, F = D * H features.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from safeshape.signals.probes.features import Features, LayerPooling
from safeshape.signals.probes.folds import Fold, Labels
from safeshape.signals.reliability import auroc

Floats = NDArray[np.float64]
C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.1, 1.0, 10.0)
SCALES = (0.01, 100.0)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """logit of harm = x . weight + bias, on raw features (B, D * H). `layer_weights`: where they were learned."""

    weight_F: Features
    bias: float
    layer_weights: tuple[float, ...] | None = None

    def logits(self, x_BF: Features) -> Floats:
        """The log odds of harm."""
        found: Floats = x_BF.astype(np.float64) @ self.weight_F.astype(np.float64) + self.bias
        return found

    def scaled(self, scale: float) -> "Linear":
        """With log odds multiplied by `scale`."""
        weight_F = (self.weight_F * np.float32(scale)).astype(np.float32)
        return Linear(weight_F=weight_F, bias=self.bias * scale, layer_weights=self.layer_weights)


def fit_linear(
    x_BF: Features, labels: Labels, *, C: float, layer_pooling: LayerPooling, layers: int, seed: int = 0
) -> Linear:
    """Fit on features of `layers` layers side by side, (B, layers * H).

    concat: one weight per feature. mean: on the mean over layers; every layer gets 1 / layers of its weight. learned:
    softmax weights over layers, fitted jointly with the regression on their weighted sum (`fit_learned`).
    """
    if layer_pooling == "learned":
        return fit_learned(x_BF.reshape(len(x_BF), layers, -1), labels, C=C, seed=seed)
    if layer_pooling == "mean":
        x_BF = x_BF.reshape(len(x_BF), layers, -1).mean(1)
    scaler = StandardScaler().fit(x_BF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a large C on separable data has no finite end
        regression = LogisticRegression(C=C, max_iter=1000, random_state=seed).fit(scaler.transform(x_BF), labels)
    weight_F = (regression.coef_[0] / scaler.scale_).astype(np.float32)
    bias = float(regression.intercept_[0] - (regression.coef_[0] * scaler.mean_ / scaler.scale_).sum())
    if layer_pooling == "mean":
        weight_F = np.tile(weight_F / np.float32(layers), layers)
    return Linear(weight_F=weight_F, bias=bias)


def fit_learned(x_BDH: Features, labels: Labels, *, C: float, seed: int = 0) -> Linear:
    """Layer weights s = softmax(a) and a direction v fitted together, by L-BFGS.

    Every layer is standardised; z = sum over d of s_d * x_d, logit = z . v + b. Minimised as scikit-learn does:
    C * sum of log losses + |v|^2 / 2; a has no penalty and starts at 0, so that all layers begin alike.
    Folded: weight of layer d is s_d * v / scale_d.
    """
    torch.manual_seed(seed)
    mean_DH, scale_DH = x_BDH.mean(0, dtype=np.float64), x_BDH.std(0, dtype=np.float64)
    scale_DH[scale_DH == 0] = 1.0
    z_BDH = torch.from_numpy((x_BDH - mean_DH) / scale_DH).double()
    y_B = torch.from_numpy(labels.astype(np.float64))
    a_D = torch.zeros(x_BDH.shape[1], dtype=torch.float64, requires_grad=True)
    v_H = torch.zeros(x_BDH.shape[2], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a_D, v_H, b], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-10
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logit_B = torch.einsum("bdh,d,h->b", z_BDH, torch.softmax(a_D, 0), v_H) + b
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logit_B, y_B, reduction="sum")
        loss = (fit + v_H.square().sum() / (2 * C)) / len(y_B)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    s_D, v = torch.softmax(a_D, 0).detach().numpy(), v_H.detach().numpy()
    weight_DH = s_D[:, None] * v[None] / scale_DH
    return Linear(
        weight_F=weight_DH.reshape(-1).astype(np.float32),
        bias=float(b.detach()) - float((weight_DH * mean_DH).sum()),
        layer_weights=tuple(float(value) for value in s_D),
    )


def balanced_log_loss(logits: Floats, labels: Labels) -> float:
    """The mean of the mean log losses of harmful and of harmless prompts: neither side's number counts."""
    losses = np.logaddexp(0, np.where(labels, -logits, logits))
    return float(np.mean([losses[labels == label].mean() for label in (True, False)]))


@dataclass(frozen=True, kw_only=True)
class Validated:
    """What cross-validation found: the C of the lowest loss, its loss and mean AUROC, out-of-fold log odds (B,)."""

    C: float
    loss: float
    auroc: float
    logits: Floats


def cross_validate(
    x_BF: Features,
    labels: Labels,
    folds: Sequence[Fold],
    *,
    grid: Sequence[float],
    layer_pooling: LayerPooling,
    layers: int,
    seed: int = 0,
) -> Validated:
    """Choose C by the mean, over folds, of the balanced log loss of what was held out. Ties go to the smaller C."""
    best: Validated | None = None
    for C in sorted(grid):
        logits = np.zeros(len(labels))
        for fold in folds:
            linear = fit_linear(
                x_BF[fold.fit], labels[fold.fit], C=C, layer_pooling=layer_pooling, layers=layers, seed=seed
            )
            logits[fold.held_out] = linear.logits(x_BF[fold.held_out])
        loss = float(np.mean([balanced_log_loss(logits[f.held_out], labels[f.held_out]) for f in folds]))
        if best is None or loss < best.loss - 1e-9:
            value = float(np.mean([auroc(-logits[f.held_out], labels[f.held_out]) for f in folds]))
            best = Validated(C=C, loss=loss, auroc=value, logits=logits)
    if best is None:
        raise ValueError("there is no C to choose from")
    return best


def calibration_scale(logits: Floats, labels: Labels, *, known: Floats | None = None) -> float:
    """The factor on the log odds with the lowest balanced log loss, within 0.01 and 100; 1 where all are right.

    Fitted on out-of-fold log odds: those of rows that were fitted on are too sure of themselves. Perfectly separated
    labels make every larger factor likelier and say nothing about a scale. One factor, no shift: it makes p_safe mean
    what it says and moves no prompt across 0.5. `known`: other out-of-fold log odds of the same rows, from folds that
    left no group out; both then count alike.
    Source: Guo et al. 2017, arXiv 1706.04599 (a temperature, 1 / factor).
    """
    if known is not None:
        logits, labels = np.concatenate([logits, known]), np.concatenate([labels, labels])
    if (np.where(labels, logits, -logits) > 0).all():
        return 1.0

    def loss(log_scale: float) -> float:
        return balanced_log_loss(math.exp(log_scale) * logits, labels)

    bounds = (math.log(SCALES[0]), math.log(SCALES[1]))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)
