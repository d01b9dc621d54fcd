"""Whether scores come from the embedded world, so that what is made from them can say so."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from safeshape import world


def is_world(scorer: Mapping[str, Any]) -> bool:
    """Whether a scorer's identity names the world's guard or a model the world ships, at any depth of it.

    A shipped model is known by its folder, also where another installation wrote the scores.
    """
    folder = PurePath(world.ASSETS).parts[-3:]

    def known(name: str, value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(known(inner, item) for inner, item in value.items())
        if isinstance(value, list | tuple):
            return any(known(name, item) for item in value)
        if not isinstance(value, str):
            return False
        if name == "guard" and value == "world":
            return True
        return value.startswith("world:") or PurePath(value).parts[-4:-1] == folder

    return known("", scorer)
