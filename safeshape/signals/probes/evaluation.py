"""The probe measured as a sceptic would: what is scored was never fitted on, beside a bag of words on the same rows.

Shape suffix: R scored prompts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.metrics import brier_score_loss

from safeshape.signals.probes.choosing import Choice
from safeshape.signals.probes.fitting import fit_linear
from safeshape.signals.probes.folds import Labels
from safeshape.signals.probes.methods import Method, ProbeMethod, Settings, Verdict
from safeshape.signals.probes.protocol import Labelled, Unit, units
from safeshape.signals.reliability import auroc, calibration_error
from safeshape.stats import bootstrap, wilson

RECALL = 0.8  # at which the share of harmless prompts flagged is compared, whatever the threshold
SHUFFLES = 20
Progress = Callable[[str, int, int], None]


def measured(verdict: Verdict, labels: Labels, own_R: Labels, threshold: float, seed: int) -> dict[str, Any]:
    """One method on one unit. `own_R`: which of the scored rows are the unit's own; rates are of those alone."""
    p_safe_R = expit(-verdict.logits)
    value, (low, high) = (
        auroc(p_safe_R, labels),
        _interval(lambda rows: auroc(p_safe_R[rows], labels[rows]), labels, seed),
    )
    found: dict[str, Any] = {"auroc": {"value": value, "low": low, "high": high}}
    for name, kind in (("harmless_flagged", False), ("harmful_flagged", True)):
        flagged = p_safe_R[own_R & (labels == kind)] < threshold
        if len(flagged):
            ends = wilson(int(flagged.sum()), len(flagged))
            found[name] = {"value": float(flagged.mean()), "low": ends[0], "high": ends[1], "n": len(flagged)}
    harmless = p_safe_R[own_R & ~labels]
    if len(harmless):
        cut = float(np.quantile(p_safe_R[labels], RECALL, method="higher"))
        found["harmless_flagged_at_recall"] = float((harmless <= cut).mean())
    found["brier"] = float(brier_score_loss(labels, 1 - p_safe_R))
    found["brier_uncalibrated"] = float(brier_score_loss(labels, expit(verdict.raw)))
    found["ece"] = calibration_error(p_safe_R, labels)
    found["ece_uncalibrated"] = calibration_error(expit(-verdict.raw), labels)
    return found


def _interval(statistic: Callable[[Any], float], labels: Labels, seed: int) -> tuple[float, float]:
    """The bootstrap interval of a statistic of row numbers, harmful and harmless rows resampled apart."""
    groups = (np.flatnonzero(labels), np.flatnonzero(~labels))
    return bootstrap(lambda *drawn: statistic(np.concatenate(drawn)), *groups, seed=seed)


def compared(probe: Verdict, bag: Verdict, labels: Labels, seed: int) -> dict[str, float]:
    """AUROC of the probe minus that of the bag of words, with a paired bootstrap: both on the same resampled rows."""

    def difference(rows: Any) -> float:
        return auroc(-probe.logits[rows], labels[rows]) - auroc(-bag.logits[rows], labels[rows])

    low, high = _interval(difference, labels, seed)
    return {"value": difference(np.arange(len(labels))), "low": low, "high": high}


def evaluate(
    data: Labelled,
    probe: Method,
    bag: Method,
    *,
    threshold: float = 0.5,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
) -> list[dict[str, Any]]:
    """Every unit of `protocol.units`, measured with both methods.

    A prompt is flagged when its p_safe is below `threshold`. Layers, poolings and C are chosen anew for every unit,
    from the rows that it may fit on; a left-out category takes the choice made with its whole family left out.
    """
    chosen: dict[str, tuple[Settings, Settings]] = {}
    found, todo = [], list(units(data, seed=seed))
    for number, unit in enumerate(todo):
        given = chosen.get(unit.like or "", (None, None))
        verdicts = [method.run(unit.fit, unit.asked, one) for method, one in zip((probe, bag), given, strict=True)]
        chosen[unit.name] = (verdicts[0].settings, verdicts[1].settings)
        found.append(_row(unit, data, verdicts[0], verdicts[1], threshold, seed))
        progress("measured", number + 1, len(todo))
    return found


def _row(unit: Unit, data: Labelled, probe: Verdict, bag: Verdict, threshold: float, seed: int) -> dict[str, Any]:
    labels, own_R = data.labels[unit.asked], np.isin(unit.asked, unit.own)
    return {
        "name": unit.name,
        "kind": unit.kind,
        "harmful": int(labels.sum()),
        "harmless": int((~labels).sum()),
        "own": int(own_R.sum()),
        "fitted_on": len(unit.fit),
        "near_duplicates_dropped": unit.dropped,
        "chosen": _shown(probe.settings.choice, probe.settings.C),
        "probe": measured(probe, labels, own_R, threshold, seed),
        "bag_of_words": {"C": bag.settings.C, **measured(bag, labels, own_R, threshold, seed)},
        "difference": compared(probe, bag, labels, seed),
    }


def _shown(choice: Choice | None, C: float) -> dict[str, Any]:
    if choice is None:
        return {"C": C}
    return {"pooling": choice.pooling, "layers": list(choice.layers), "layer_pooling": choice.layer_pooling, "C": C}


def shuffled_control(data: Labelled, probe: ProbeMethod, *, seed: int = 0) -> dict[str, Any]:
    """The in-distribution AUROC of probes fitted on shuffled labels: should lie around 0.5.

    Mean and range over 20 shuffles: one alone strays, because whole data sets lie to one side of any direction.
    """
    unit = next(units(data, seed=seed))
    fitted, labels = probe.fit(unit.fit), data.labels[unit.asked]
    choice, rng, values = fitted.choice, np.random.default_rng(seed), []
    x, asked = probe.bank.take(choice, unit.fit), probe.bank.take(choice, unit.asked)
    for _ in range(SHUFFLES):
        order = rng.permutation(data.labels[unit.fit])
        layers = len(choice.layers)
        linear = fit_linear(x, order, C=fitted.C, layer_pooling=choice.layer_pooling, layers=layers, seed=seed)
        values.append(auroc(-linear.logits(asked), labels))
    return {"mean": float(np.mean(values)), "lowest": min(values), "highest": max(values), "shuffles": SHUFFLES}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the units of a kind, every unit alike, and in how many the probe is surely better or worse."""
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        here = [row for row in rows if row["kind"] == kind]
        found[kind] = {
            "units": len(here),
            "probe": float(np.mean([row["probe"]["auroc"]["value"] for row in here])),
            "bag_of_words": float(np.mean([row["bag_of_words"]["auroc"]["value"] for row in here])),
            "probe_better": sum(row["difference"]["low"] > 0 for row in here),
            "probe_worse": sum(row["difference"]["high"] < 0 for row in here),
        }
    return found
