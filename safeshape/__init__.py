"""Safeshape: fine-tune a language model on data nobody has vetted and keep its safety alignment."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeshape.trainer import SafeTrainer
    from safeshape.types import Span, Weights

__version__ = "0.1.0"
__all__ = ["SafeTrainer", "Span", "Weights"]

_HOME = {"SafeTrainer": "safeshape.trainer", "Span": "safeshape.types", "Weights": "safeshape.types"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `safeshape --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'safeshape' has no attribute {name!r}")
    return vars(importlib.import_module(_HOME[name]))[name]
