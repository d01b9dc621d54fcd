"""The table of guards: how each kind is asked and which tokens are its answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GuardRow:
    """How one kind of guard is asked.

    `safe`, `unsafe`: the label tokens, each a single token of the guard. `answer_prefix`: text the guard writes before
    its label (Llama Guard 3: two newlines). `template`: extra arguments of its chat template. `model`: default weights.
    """

    safe: str = "safe"
    unsafe: str = "unsafe"
    answer_prefix: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


GUARDS: dict[str, GuardRow] = {
    "world": GuardRow(),
    "llama-guard-3": GuardRow(answer_prefix="\n\n", model="meta-llama/Llama-Guard-3-8B"),
}
