"""Experiments as a matrix of attack, defence, model and seed: one cell, one folder, one set of rows."""

from safeshape.bench.matrix import Cell, Matrix, read_matrix
from safeshape.bench.runner import Failed, Finished, run_cells

__all__ = ["Cell", "Failed", "Finished", "Matrix", "read_matrix", "run_cells"]
