"""Does the probe read the request or the template? The same prompts under another system prompt, and the trap itself.

A fixed system prompt on every harmful row of the training data lets a probe learn the system prompt: in its own
terms it is perfect, and it knows nothing. Shape suffix: B prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from safeshape.signals.probes.choosing import Fitted
from safeshape.signals.probes.features import Features, Progress, extract
from safeshape.signals.probes.fitting import Linear, fit_linear
from safeshape.signals.probes.folds import Labels
from safeshape.signals.probes.reading import Prompt, Reader
from safeshape.signals.reliability import auroc
from safeshape.store import Store

SYSTEM = "You are a friendly assistant. Answer in plain words."  # any text does: what it says must not matter
MOST = 300  # prompts of each label; the check compares means and needs no more


def with_system(prompt: Prompt, system: str = SYSTEM) -> Prompt:
    """The prompt under a system prompt, in place of one it may have."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]


def some(rows: Sequence[int], labels: Labels, seed: int) -> list[int]:
    """Up to MOST rows of each label, drawn by a seed."""
    rng, found = np.random.default_rng(seed), []
    for kind in (True, False):
        here = [row for row in rows if labels[row] == kind]
        found += rng.permutation(here)[:MOST].tolist()
    return sorted(found)


def template_check(
    prompts: Sequence[Prompt],
    labels: Labels,
    fitted: Fitted,
    reader: Reader,
    *,
    fit_rows: Sequence[int],
    test_rows: Sequence[int],
    system: str = SYSTEM,
    store: Store | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The fitted probe and a trapped one on test prompts with and without a system prompt.

    The trapped probe has the same layers and C and is fitted with the system prompt on its harmful rows only.
    `across`: AUROC with the system prompt on nobody, on all, on the harmful alone and on the harmless alone. A probe
    that reads requests has four equal numbers; one that reads the template falls far below 0.5 in the last.
    `shift`: mean p_safe with the system prompt minus without it, of the same prompts.
    """
    train, test = some(fit_rows, labels, seed), some(test_rows, labels, seed)
    order = train + test
    choice = fitted.choice

    def states(shown: Sequence[Prompt]) -> Features:
        x = extract(shown, reader, layers=choice.layers, poolings=(choice.pooling,), store=store, progress=progress)
        return x.reshape(len(shown), -1)

    plain = states([prompts[row] for row in order])
    dressed = states([with_system(prompts[row], system) for row in order])
    n, marks, truth = len(train), labels[train], labels[test]
    trapped = fit_linear(
        np.where(marks[:, None], dressed[:n], plain[:n]),
        marks,
        C=fitted.C,
        layer_pooling=choice.layer_pooling,
        layers=len(choice.layers),
        seed=seed,
    )
    return {
        "system_prompt": system,
        "harmful": int(truth.sum()),
        "harmless": int((~truth).sum()),
        "probe": _four(fitted.linear, plain[n:], dressed[n:], truth),
        "trapped": _four(trapped, plain[n:], dressed[n:], truth),
    }


def _four(linear: Linear, plain: Features, dressed: Features, truth: Labels) -> dict[str, Any]:
    bare, clothed = -linear.logits(plain), -linear.logits(dressed)  # log odds of safety
    dress = {
        "nobody": bare,
        "everybody": clothed,
        "the harmful": np.where(truth, clothed, bare),
        "the harmless": np.where(truth, bare, clothed),
    }
    change = expit(clothed) - expit(bare)
    return {
        "across": {name: auroc(values, truth) for name, values in dress.items()},
        "shift": {"harmful": float(change[truth].mean()), "harmless": float(change[~truth].mean())},
    }
