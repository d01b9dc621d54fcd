"""Functions by name: a shipped one from its table, or a user's own as `module:function`.

Policies, attacks and whatever else a recipe names are found by the same two functions.
"""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def named(name: object, table: Mapping[str, T], kind: str) -> T | Any:
    """The entry of the table, or what a user's module holds under `module:function`.

    `kind`: what the table is of, for the message. Errors: ValueError that names the unknown name or the failed import.
    """
    if not isinstance(name, str):
        raise ValueError(f"{_article(kind)}'s name must be a string or a function, got {name!r}")
    if name in table:
        return table[name]
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(table)}, or your own as module:function")
    try:
        return vars(importlib.import_module(module))[function]
    except (ImportError, KeyError) as error:
        raise ValueError(f"cannot import {kind} {name!r}: {error}") from error


def check_parameters(
    function: Callable[..., Any], parameters: Mapping[str, Any], label: str, given: Collection[str]
) -> None:
    """Refuse parameters that a function does not take, and texts where it has a float.

    `label`: what to call it, as "policy 'star'". `given`: what the caller passes itself.
    Errors: ValueError that names the parameter.
    """
    known = {key: value for key, value in inspect.signature(function).parameters.items() if key not in given}
    if any(value.kind is inspect.Parameter.VAR_KEYWORD for value in known.values()):
        return
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"{label} has no parameter {key!r}; it has: {', '.join(known) or 'none'}")
        if isinstance(known[key].default, float) and isinstance(value, bool | str | None):
            raise ValueError(f"{label}: parameter {key!r} must be a number, got {value!r}")


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
