"""Settings of `safeshape train`."""

import json
from dataclasses import MISSING, field, fields
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option, validated
from safeshape.config.safety_check import SafetyCheckSettings


def _specified(value: dict[str, Any] | str | None, name: str) -> dict[str, Any] | str | None:
    """A name or a mapping. Errors: ValueError for a JSON object that cannot be read."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        found: dict[str, Any] = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    return found


@dataclass(config=STRICT, kw_only=True)
class TrainConfig:
    """Fine-tune a model with a safety policy or under a defence."""

    dataset_name: str = option(help="a JSONL, JSON, CSV or Parquet file, a saved dataset folder, or a Hub id")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    policy: dict[str, Any] | str | None = option(
        None,
        help='a policy name, a JSON object such as \'{"name": "star", "kl": 0.5}\', or your own module:function '
        "(default: star)",
    )
    defence: dict[str, Any] | str | None = option(
        None,
        help="in place of a policy, a row of `safeshape defences list`: its name, a JSON object with its parameters, "
        "or your own module:function",
    )
    base_model: str | None = option(
        None, help="defence: folder or Hub id of the model before its alignment, world:llama-base for that of the world"
    )
    safe_data: str | None = option(
        None, help="defence: dataset of requests with an aligned model's answers, or world for the embedded world's"
    )
    harmful_data: str | None = option(None, help="defence: dataset of harmful requests with harmful answers, or world")
    reference: Literal["auto", "adapter_off", "copy", "cached"] = option(
        "auto", help="the frozen model the KL holds to: live, or its states stored on disk before training"
    )
    cache_dir: str | None = option(
        None, help="where `cached` keeps its states; else in the output folder until training ends"
    )
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="precision of the stored states; auto: the model's"
    )
    loss_head: Literal["auto", "fused", "dense"] = option(
        "auto", help="fused: never full logits; auto: fused where the model's output layer can be read"
    )
    gradient_floor: float = option(1e-6, help="updates with a smaller gradient norm are skipped and counted")
    overlong: Literal["refuse", "truncate"] = option("refuse", help="what happens to rows longer than max_length")
    guard: str | None = option(
        None, help="score rows first with this row of the guard table or YAML file, one score a chunk"
    )
    guard_model: str | None = option(None, help="folder or Hub id of the guard's weights, where not the row's own")
    chunk: int = option(5, help="words per chunk of the guard's score")
    probe: str | None = option(
        None, help="activation probe: a folder it was saved in, or world (fitted on the embedded world's prompts)"
    )
    probe_harmful: list[str] = field(
        default_factory=list, metadata={"help": "files of harmful prompts: a probe is fitted on the starting model"}
    )
    probe_harmless: list[str] = field(
        default_factory=list, metadata={"help": "files of harmless prompts beside them, look-alikes among them"}
    )
    probe_layers: str = option("-1", help="layers a fitted probe reads: numbers with commas, all, or auto")
    probe_pooling: Literal["last", "mean", "auto"] = option("last", help="tokens of a prompt a fitted probe reads")
    judge: str | None = option(
        None,
        help="address of an OpenAI-compatible chat server, folder or Hub id of a model to run in this process, world "
        "(the embedded world's oracle; world:0.1 errs in one of ten), or your own module:function",
    )
    judge_model: str | None = option(None, help="the judge's name at its server (default: gpt-oss-20b)")
    judge_settings: dict[str, Any] | str | None = option(
        None, help="further settings by their names in `safeshape judge`, as JSON: '{\"concurrency\": 32}'"
    )
    judge_mode: Literal["pair", "on_policy"] = option(
        "pair", help="judge the training pairs once, or the model's own answers while it trains"
    )
    judge_every: int = option(50, help="on_policy: optimiser steps from one round of answers to the next")
    judge_wait_s: float = option(0.0, help="on_policy: the longest a step waits for verdicts, in seconds")
    judge_max_new_tokens: int = option(128, help="on_policy: longest answer of the model and of its reference")
    judge_degradation: float = option(1.0, help="on_policy: how much harm counts again that the reference did not do")
    store: str | None = option(
        None, help="file that keeps scores, verdicts and answers for the next run (default: OUTPUT_DIR.store.sqlite)"
    )
    on_error: Literal["stop", "drop"] = option(
        "stop", help="rows that get no score: stop with their count, or leave them out"
    )
    safety_check: dict[str, Any] | str | None = option(
        None,
        help="prompts answered every few steps, with stop or roll-back when a rate leaves its band: a mapping in a "
        "recipe, or JSON; see docs/report.md",
    )
    inert: Literal["warn", "error", "off"] = option(
        "warn", help="what happens when scores, masks or the reference have no effect on training"
    )

    @property
    def critic(self) -> bool:
        """Whether something is to give the risk."""
        return bool(self.guard or self.probe or self.probe_harmful or self.judge)

    def __post_init__(self) -> None:
        self.policy, self.defence = _specified(self.policy, "policy"), _specified(self.defence, "defence")
        self._check_defence()
        if self.gradient_floor < 0:
            raise ValueError(f"gradient_floor must be at least 0, got {self.gradient_floor}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if sum(map(bool, (self.guard, self.probe or self.probe_harmful, self.judge))) > 1:
            raise ValueError("give a guard, a probe or a judge: one of them")
        self._check_probe()
        self._check_judge()
        _ = self.checked  # refuses what cannot be
        if not self.critic and (self.store or self.on_error != "stop"):
            raise ValueError("store and on_error are for scores made by this command; give --guard, --probe or --judge")

    def _changed(self, *names: str) -> str | None:
        """The first of these settings that is not at its default."""
        defaults = {f.name: f.default if f.default is not MISSING else f.default_factory for f in fields(self)}
        values = {name: list if self.__dict__[name] == [] else self.__dict__[name] for name in names}
        return next((name for name in names if values[name] != defaults[name]), None)

    def _check_defence(self) -> None:
        if self.defence is None:
            changed = self._changed("base_model", "safe_data", "harmful_data")
            if changed:
                raise ValueError(f"{changed} is for a defence; give --defence")
            self.policy = "star" if self.policy is None else self.policy
        elif self.policy is not None:
            raise ValueError("give a policy or a defence: one of them (a policy is a defence as well)")

    def _check_probe(self) -> None:
        if bool(self.probe_harmful) != bool(self.probe_harmless):
            raise ValueError("fitting a probe needs both probe_harmful and probe_harmless")
        if self.probe and self.probe_harmful:
            raise ValueError("give a saved probe, or prompts to fit one on, not both")
        if not self.probe_harmful and self.probe != "world":
            changed = self._changed("probe_layers", "probe_pooling")
            if changed:
                raise ValueError(f"{changed} is for a probe that is fitted; give --probe_harmful and --probe_harmless")
        if self.probe_layers not in ("all", "auto"):
            try:
                [int(part) for part in self.probe_layers.split(",")]
            except ValueError as error:
                raise ValueError(f"probe_layers must be numbers, all or auto, got {self.probe_layers!r}") from error

    @property
    def checked(self) -> SafetyCheckSettings | None:
        """The settings of the safety check. Errors: ValueError that names the field."""
        given: Any = self.safety_check
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"safety_check is not valid JSON: {error}") from error
        if not isinstance(given, dict | None):
            raise ValueError("safety_check must be a mapping")
        try:
            return None if given is None else validated(SafetyCheckSettings, given)
        except ValueError as error:
            raise ValueError(f"safety_check: {error}") from error

    def _check_judge(self) -> None:
        own = ("judge_every", "judge_wait_s", "judge_max_new_tokens", "judge_degradation")
        if self.judge is None:
            changed = self._changed("judge_model", "judge_settings", "judge_mode", *own)
            if changed:
                raise ValueError(f"{changed} belongs to a judge; give --judge")
        elif self.judge_mode == "pair" and self._changed(*own):
            raise ValueError(f"{self._changed(*own)} is for the model's own answers; give --judge_mode on_policy")
        if self.judge_every < 1 or self.judge_max_new_tokens < 1:
            raise ValueError("judge_every and judge_max_new_tokens must be at least 1")
        if not self.judge_wait_s >= 0 or not self.judge_degradation >= 0:
            raise ValueError("judge_wait_s and judge_degradation must be at least 0")
        if isinstance(self.judge_settings, str):
            try:
                self.judge_settings = json.loads(self.judge_settings)
            except json.JSONDecodeError as error:
                raise ValueError(f"judge_settings is not valid JSON: {error}") from error
        if not isinstance(self.judge_settings, dict | None):
            raise ValueError("judge_settings must be a JSON object")
        if {"judge", "judge_model", "store"} & set(self.judge_settings or {}):
            raise ValueError("judge_settings: judge, judge_model and store have flags of their own")
