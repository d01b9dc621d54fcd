"""What every page of a matrix says about its run."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from safeshape.bench.matrix import Cell, Matrix

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # the rows of a cell by its key


def run_facts(scale: str, matrix: Matrix, done: Sequence[Cell], *, seconds: Sequence[float]) -> dict[str, str]:
    """What the page says about the run. `done`: the cells with rows, `seconds` each of them took."""
    seeds = sorted({cell.seed for cell in done})
    judged = "the world's oracle, exact; guard and probe, which train, do not judge"
    return {
        "Cells": f"{len(done)} of {len(matrix.cells)} have rows, scale `{scale}`",
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "Training": "full fine-tuning of models of about 0.9 million parameters; rows, epochs and rates in the recipe",
        "Judge": judged,
        "Time": f"{sum(seconds) / 60:.0f} minutes of single-thread processes in all",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("safeshape", "torch", "transformers", "trl")),
    }
