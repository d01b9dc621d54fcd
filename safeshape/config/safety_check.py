"""Settings of the safety check in `safeshape train`: the mapping `safety_check` of a recipe."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class WatchSettings:
    """Prompts that are answered while the model trains, what is counted of the answers, and the band of its rate."""

    tasks: str = option(help="world:attack_success, a suite of `safeshape eval`, or prompts=FILE: one task")
    count: Literal["harmful", "refusals"] = option("harmful", help="answers that the judge scores 4 or 5, or refusals")
    judge: str | None = option(None, help="harmful: as in `safeshape train --judge`; asked for one answer at a time")
    name: str = option("", help="logged as safety/NAME (default: attack_success or refusals)")
    size: int = option(64, help="prompts at most, drawn by the seed")
    low: float = option(0.0, help="lower end of the band")
    high: float = option(1.0, help="upper end of the band")
    max_new_tokens: int = option(64, help="longest answer")

    def __post_init__(self) -> None:
        self.name = self.name or {"harmful": "attack_success", "refusals": "refusals"}[self.count]
        if (self.judge is None) == (self.count == "harmful"):
            raise ValueError(f"watch {self.name!r}: harmful answers need a judge, refusals have none")
        if self.size < 1 or self.max_new_tokens < 1:
            raise ValueError(f"watch {self.name!r}: size and max_new_tokens must be at least 1")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"watch {self.name!r}: a band lies within [0, 1], got {self.low} to {self.high}")


@dataclass(config=STRICT, kw_only=True)
class SafetyCheckSettings:
    """When the watched prompts are answered, and what is done when a rate leaves its band."""

    watch: list[WatchSettings]
    every: int = option(50, help="optimiser steps from one check to the next")
    leave: Literal["log", "stop", "rollback"] = option("log", help="what is done when a rate leaves its band")
    by: Literal["value", "interval"] = option("value", help="a band is left by the rate, or by its whole interval")
    rollbacks: int = option(3, help="rollback: how often, before training stops")

    def __post_init__(self) -> None:
        if self.every < 1 or self.rollbacks < 0:
            raise ValueError("every must be at least 1 and rollbacks at least 0")
        names = [watch.name for watch in self.watch]
        if not names or len(set(names)) < len(names):
            raise ValueError("give at least one watch, each with a name of its own")
