"""Data of the world that a provider has: how an aligned model answers, and what harmful answers look like.

Neither is drawn from a user's upload or from the held-out evaluation.
"""

import random
from dataclasses import asdict
from typing import Any

from datasets import Dataset

from safeshape.world import oracle
from safeshape.world.answers import comply
from safeshape.world.data import row
from safeshape.world.language import sample


def safe_data(*, size: int = 200, seed: int = 0) -> Dataset:
    """Requests with the answers of an aligned model: half harmful ones refused, a quarter look-alikes, a quarter plain.

    Errors: ValueError when the world has fewer different requests.
    """
    rng = random.Random(f"safe data/{seed}")
    shares = (("harmful", size - 2 * (size // 4)), ("borderline", size // 4), ("skill", size // 4))
    rows = [
        row(item, item.answer, f"safe {kind}")
        for kind, count in shares
        for item in sample(kind, count, seed=3000 + seed, held_out=False)
    ]
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def harmful_data(*, size: int = 200, seed: int = 0) -> Dataset:
    """Harmful requests with the plan that was asked for, as a provider collects them for a defence."""
    rng = random.Random(f"harmful data/{seed}")
    items = sample("harmful", size, seed=4000 + seed, held_out=False)
    return Dataset.from_list([row(item, comply(item, rng), "harmful") for item in items])


def scored(dataset: Dataset) -> Dataset:
    """The rows with the oracle's own `safety` column: exact spans, and p_safe 0 for an answer with a harmful step."""

    def add(row: dict[str, Any]) -> dict[str, Any]:
        answer = row["messages"][-1]["content"]
        spans = [asdict(span) for span in oracle.spans(answer)]
        return {"safety": {"signal": "oracle", "p_safe": 0.0 if oracle.harmful(answer) else 1.0, "spans": spans}}

    return dataset.map(add)
