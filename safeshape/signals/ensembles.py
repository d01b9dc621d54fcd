"""Several guards as one: the mean or the minimum of their scores, at the same chunk ends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from safeshape.config.parser import read_yaml
from safeshape.signals.chunks import Unit
from safeshape.signals.guards import AnyGuard, load_guard
from safeshape.signals.reading import Failure, Item, Reader, Reading, Scoring

COMBINE: dict[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "min": min}


@dataclass(frozen=True, kw_only=True)
class Ensemble(Scoring):
    """Guards that score together. Chunk ends are those of the first, whatever tokens the others see.

    `how`: "mean" (the released code of STAR-DSS, arXiv 2505.17196) or "min" (the strictest guard decides). When a
    member fails on a conversation the whole has no score: a mean over those that answered would be another guard.
    """

    members: tuple[Reader, ...]
    how: str = "mean"

    def __post_init__(self) -> None:
        if self.how not in COMBINE:
            raise ValueError(f"how must be one of {', '.join(COMBINE)}, got {self.how!r}")
        if len(self.members) < 2:
            raise ValueError(f"an ensemble needs at least two guards, got {len(self.members)}")

    @property
    def name(self) -> str:
        """The names of the members under the way they are combined, as `mean(a, b)`."""
        return f"{self.how}({', '.join(member.name for member in self.members)})"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first member's tokenizer, which decides where chunks end."""
        return self.members[0].tokenizer

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]:
        """The combined p_safe of the partial answers that end at the given offsets, or which member failed and why."""
        by_member = [member.p_safe_at(items, batch_size=batch_size) for member in self.members]
        return [self._combined(readings) for readings in zip(*by_member, strict=True)]

    def identity(self, chunk: int, unit: Unit) -> dict[str, Any]:
        """What made a score: the identity of every member."""
        members = [member.identity(chunk, unit) for member in self.members]
        return {"guard": self.name, "combine": self.how, "members": members, "chunk": chunk, "unit": unit}

    def _combined(self, readings: Sequence[Reading]) -> Reading:
        found: list[list[float]] = []
        for member, reading in zip(self.members, readings, strict=True):
            if isinstance(reading, Failure):
                return Failure(reason=f"guard {member.name!r}: {reading.reason}")
            found.append(reading)
        return [COMBINE[self.how](scores) for scores in zip(*found, strict=True)]


def load_scorer(row: str | Mapping[str, Any], **options: Any) -> AnyGuard | Ensemble:
    """Load a guard, or several: a mapping or a YAML file with `members` (rows) and `combine` ("mean" or "min").

    A member's weights are its row's `model`. `options` as in `load_guard`; with members only those that fit all.
    Errors: ValueError in one sentence.
    """
    given = read_yaml(row) if isinstance(row, str) and row.endswith((".yaml", ".yml")) else row
    if isinstance(given, str) or "members" not in given:
        return load_guard(row, **options)
    for key in given:
        if key not in ("members", "combine"):
            raise ValueError(f"an ensemble has no field {key!r}; it has: members, combine")
    members = given["members"]
    if not isinstance(members, list | tuple) or not all(isinstance(member, str | Mapping) for member in members):
        raise ValueError(f"members must be a list of guard rows, got {members!r}")
    for key in ("model", "tokenizer"):
        if options.get(key) is not None:
            raise ValueError(f"{key} cannot be given for several guards; give each member its model")
    how = given.get("combine", "mean")
    return Ensemble(members=tuple(load_guard(member, **options) for member in members), how=how)
