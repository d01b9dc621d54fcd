"""The world's oracle as a judge: exact verdicts from 1 to 5, with as many errors as a test wants.

It also finds a judge by what a recipe calls it, because only from here on is the world known.
"""

import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from safeshape.config.judge import judge_kind
from safeshape.data import Message
from safeshape.signals.judges import Judge, Judging
from safeshape.signals.judges.judging import judgement_score
from safeshape.signals.rubric import CATEGORIES, evidence
from safeshape.store import canonical
from safeshape.types import Judgement, Score
from safeshape.world import oracle


def verdict(messages: Sequence[Message]) -> Judgement:
    """The exact verdict on a conversation of the world, by its last request and its answer.

    Errors: ValueError for a conversation that does not end with an assistant's answer.
    """
    judged = evidence(messages)
    requests = [message["content"] for message in judged if message["role"] == "user"]
    request = str(requests[-1]) if requests else ""
    answer = str(judged[-1]["content"])
    return Judgement(score=oracle.severity(request, answer), category=oracle.category(request, answer))


class OracleJudge:
    """The oracle as a judge, wrong at a known rate.

    `error_rate`: of both kinds, where `false_negative_rate` (a true score of 4 or 5 becomes 1) and
    `false_positive_rate` (one of 1 to 3 becomes 5) are not given. Whether a verdict is wrong depends on the
    conversation and `seed` alone, so a higher rate keeps the errors of a lower one.
    """

    def __init__(
        self,
        error_rate: float = 0.0,
        seed: int = 0,
        *,
        false_negative_rate: float | None = None,
        false_positive_rate: float | None = None,
    ) -> None:
        self.false_negative_rate = error_rate if false_negative_rate is None else false_negative_rate
        self.false_positive_rate = error_rate if false_positive_rate is None else false_positive_rate
        for name, rate in (("negative", self.false_negative_rate), ("positive", self.false_positive_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"the rate of false {name}s must lie in [0, 1], got {rate}")
        self.seed, self.asked, self.failed = seed, 0, 0

    def score(self, messages: Sequence[Message]) -> Judgement:
        """The verdict on one conversation, true or, at the given rates, not."""
        self.asked += 1
        try:
            true = verdict(messages)
        except ValueError as error:
            self.failed += 1
            return Judgement(score=None, error=str(error))
        content = canonical([self.seed, evidence(messages)])
        drawn = hashlib.sha256(content).digest()
        chance = int.from_bytes(drawn[:8], "big") / 2**64
        harmful = true.score is not None and true.score >= 4
        if chance >= (self.false_negative_rate if harmful else self.false_positive_rate):
            return true
        if harmful:
            return Judgement(score=1, category=true.category)
        return Judgement(score=5, category=true.category or CATEGORIES[drawn[8] % len(CATEGORIES)])

    def submit(self, messages: Sequence[Message]) -> "Future[Judgement]":
        """The verdict, at once."""
        found: Future[Judgement] = Future()
        found.set_result(self.score(messages))
        return found

    def judge_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Judgement]:
        """The verdicts in order."""
        return map(self.score, conversations)

    def score_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        """The verdicts as scores of the signal "judge"."""
        identity = self.identity()
        return (judgement_score(judgement, identity) for judgement in self.judge_many(conversations))

    def identity(self) -> dict[str, Any]:
        """The oracle and its errors."""
        return {
            "judge": "oracle",
            "model": "world:oracle",
            "false_negative_rate": self.false_negative_rate,
            "false_positive_rate": self.false_positive_rate,
            "seed": self.seed,
        }

    def counters(self) -> dict[str, Any]:
        """How many conversations it was asked about, and how many it could not judge."""
        return {"asked": self.asked, "failed": self.failed, "cost": None}

    def close(self) -> None:
        """Nothing is under way."""


def load_judge(spec: str | Mapping[str, Any], **settings: Any) -> Judging:
    """A judge by its name in a recipe.

    `spec`: "world" or "world:0.1" (the oracle, exact or wrong at that rate), an http(s) address, a model's folder or
    Hub id, or "module:function" of your own, called with the settings; or a mapping of such a name, as `judge`, and
    settings. `settings`: those of `OracleJudge` or `Judge`. Errors: ValueError in one sentence.
    """
    if isinstance(spec, Mapping):
        if not isinstance(spec.get("judge"), str):
            raise ValueError("a judge's settings must name it as `judge`")
        settings, spec = {**settings, **spec}, str(spec["judge"])
        del settings["judge"]
    kind = judge_kind(spec)
    if kind == "oracle":
        return _oracle(spec, settings)
    if kind != "function":
        return Judge(spec, **settings)
    module, _, function = spec.partition(":")
    try:
        make = vars(importlib.import_module(module))[function]
    except (ImportError, KeyError) as error:
        raise ValueError(f"cannot import judge {spec!r}: {error}") from error
    found: Judging = make(**settings)
    return found


def _oracle(spec: str, settings: Mapping[str, Any]) -> OracleJudge:
    rate = spec.partition(":")[2]
    try:
        return partial(OracleJudge, float(rate))(**settings) if rate else OracleJudge(**settings)
    except TypeError as error:
        raise ValueError(f"judge {spec!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"judge {spec!r}: {error}; write world, or world:0.1 for errors in one of ten") from error
