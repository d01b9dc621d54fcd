"""Whether scores come from the embedded world, so that what is made from them can say so."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from safeshape import world


def is_world(scorer: Any) -> bool:
    """Whether a scorer's identity names a model the world ships, at any depth of it.

    A shipped model is known by the end of its folder's path, also where another installation wrote the scores.
    """
    if isinstance(scorer, Mapping):
        return any(is_world(value) for value in scorer.values())
    if isinstance(scorer, list | tuple):
        return any(is_world(value) for value in scorer)
    if not isinstance(scorer, str):
        return False
    return scorer.startswith("world:") or PurePath(scorer).parts[-4:-1] == PurePath(world.ASSETS).parts[-3:]
