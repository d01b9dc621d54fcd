"""Labelled prompts as the probe's verbs are told of them."""

from dataclasses import field as made_by
from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT


@dataclass(config=STRICT, kw_only=True)
class PromptSet:
    """One set of prompts, all harmful or all harmless.

    `path`: a file, relative to `data_folder`; `world:KIND` or `world:KIND/held_out` for requests of the embedded world.
    `field`: the column with the prompt, a text or a list of messages (a last assistant message is left out). A .json
    file may also hold an object of objects of lists of prompts: the outermost names are then the categories.
    `category`: a column. `where`: columns and the values that rows must have. `family`: sets that are left out
    together. `role`: test sets are never fitted on.
    """

    name: str
    path: str
    label: Literal["harmful", "harmless"]
    field: str = "prompt"
    category: str | None = None
    where: dict[str, str] = made_by(default_factory=dict)
    family: str | None = None
    role: Literal["train", "test"] = "train"
