"""The records of attacks: what they draw from, what they give back, and the values that stand in the tables."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from safeshape.data import Message

Conversation = Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Conversations to draw from, each ending with an assistant's answer.

    `benign`: the task. `harmful`: harmful requests that are answered. `safe`: harmful requests that are refused.
    `identity`: exchanges of an obedient persona that go in as they are.
    """

    benign: Sequence[Conversation] = ()
    harmful: Sequence[Conversation] = ()
    safe: Sequence[Conversation] = ()
    identity: Sequence[Conversation] = ()


POOLS = ("benign", "harmful", "safe", "identity")


@dataclass(frozen=True, kw_only=True)
class Poisoned:
    """A poisoned data set.

    `dataset`: rows of `messages`, `origin` (how the row was made) and `poisoned` (whether learning it is what the
    attacker is after; false for camouflage). `report`: counts, places and hashes; never a text from the data.
    """

    dataset: list[dict[str, Any]]
    report: dict[str, Any]


class Poison(Protocol):
    """The function of a data attack. `size` None: as many rows as the pools allow."""

    def __call__(self, pools: Pools, *, size: int | None, seed: int, **parameters: Any) -> Poisoned: ...


@dataclass(frozen=True, kw_only=True)
class DataAttack:
    """A way to poison fine-tuning data. `changes`: what it does, in a phrase. `source`: where it is from."""

    run: Callable[..., Poisoned]
    changes: str
    source: str

    def __call__(self, pools: Pools, *, size: int | None = None, seed: int = 0, **parameters: Any) -> Poisoned:
        return self.run(pools, size=size, seed=seed, **parameters)


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One attempt at a prompt; unattacked it is the prompt itself.

    `messages`: where the last is the assistant's, it is to be continued, not answered. `target`: how a compliant answer
    begins, where one is known. `prefill`: the beginning of the answer that `messages` ends with. `samples`: how many
    answers are to be drawn, at `temperature` (None: the evaluation's own). `steps`: what was done, without any text.
    """

    messages: tuple[Message, ...]
    target: str | None = None
    prefill: str = ""
    samples: int = 1
    temperature: float | None = None
    steps: tuple[Mapping[str, Any], ...] = ()


Rewrite = Callable[[Attacked, Random], tuple[Attacked, ...]]  # one attempt in, one or more out


@dataclass(frozen=True, kw_only=True)
class PromptAttack:
    """A way to attack prompts at inference. `make(**parameters)` gives the function that rewrites one attempt."""

    make: Callable[..., Rewrite]
    changes: str
    source: str


def sha256_of(value: Any) -> str:
    """SHA-256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(text: str) -> dict[str, Any]:
    """A text by its length and hash, for reports: a user's own texts may be harmful."""
    return {"characters": len(text), "sha256": sha256_of(text)}
