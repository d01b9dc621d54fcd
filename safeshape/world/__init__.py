"""The embedded world: a small synthetic language with tiny aligned models, a guard and an exact oracle.

A test bench that runs offline in minutes; never evidence about real models.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
NAMES = ("llama", "qwen3", "phi3", "llama-base", "guard")  # llama-base: before its alignment


def path(name: str) -> str:
    """The folder of a shipped model, to be loaded like any local model.

    Errors: ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown world model {name!r}; the world has {', '.join(NAMES)}")
    return str(ASSETS / name)
