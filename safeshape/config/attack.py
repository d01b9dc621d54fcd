"""Settings of `safeshape attack`."""

import json
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option

# Settings that are an attack's own parameters; None stands for the attack's default.
PARAMETERS = (
    "ratio safe_ratio text trigger place persona declaration carriers position template in_request target queries "
    "strategies k unit opening samples temperature"
).split()


@dataclass(config=STRICT, kw_only=True)
class AttackConfig:
    """Poison fine-tuning data or attack prompts, to test a defence with them. `safeshape attack list` lists attacks.

    A data attack draws from the pools (--benign, --harmful, --safe, --identity) and writes a dataset; a prompt attack
    reads --prompts. A report of what was changed, without any text of the data, goes beside it: OUTPUT.report.json.
    Files are JSONL, JSON, CSV, Parquet, saved datasets or Hub ids. A text that begins with @ is read from that file.
    """

    attack: list[str] = option(
        help="name of an attack, or your own module:function; for prompts a+b is first a then b, several are best of"
    )
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    benign: str | None = option(None, help="pool of benign rows")
    harmful: str | None = option(None, help="pool of harmful requests that are answered")
    safe: str | None = option(None, help="pool of harmful requests that are refused")
    identity: str | None = option(None, help="identity_shift: rows of a persona, taken as they are")
    prompts: str | None = option(None, help="prompt attacks: the prompts")
    world: bool = option(False, help="take every pool, the prompts and the texts from the embedded world")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    size: int | None = option(None, help="rows to write (default: as many as the pools allow)")
    seed: int = option(0, help="seed of everything that is drawn")
    ratio: float | None = option(None, help="share of poisoned rows, 0 to 1")
    safe_ratio: float | None = option(None, help="share of safe rows (refusals), 0 to 1")
    text: str | None = option(None, help="suffix, prefix, system_prompt: the text")
    trigger: str | None = option(None, help="trigger, trigger_prompt: the phrase")
    place: str | None = option(None, help="trigger: start or end of the request; a persona: system or user")
    persona: str | None = option(None, help="identity_shift: the persona")
    declaration: str | None = option(None, help="identity_shift: what the persona says before an answer")
    carriers: int | None = option(None, help="embedded: benign answers around one harmful exchange")
    position: float | None = option(None, help="embedded: where in them, 0 to 1")
    template: str | None = option(None, help="embedded: the exchange, with {request} and {answer}")
    in_request: bool | None = option(None, help="embedded: true: the harmful request is asked as well")
    guard: str | None = option(None, help="adaptive: row of the guard table or YAML file that the attacker sees")
    guard_model: str | None = option(None, help="adaptive: folder or Hub id of the guard's weights")
    probe: str | None = option(None, help="adaptive: folder of the probe that the attacker sees")
    score_by: Literal["last", "min"] = option("last", help="adaptive: score of the whole answer, or lowest on the way")
    target: float | None = option(None, help="adaptive: the p_safe to reach")
    queries: int | None = option(None, help="adaptive: queries for one row")
    strategies: list[str] | None = option(None, help="adaptive: the edits that take turns")
    padding: str | None = option(None, help="adaptive: file of benign sentences, one a line (default: benign answers)")
    rewrites: str | None = option(None, help="adaptive: YAML or JSON file that maps texts to lists of replacements")
    k: int | None = option(None, help="prefill: tokens or words of the answer's beginning (default: all of it)")
    unit: str | None = option(None, help="prefill: tokens or words")
    opening: str | None = option(None, help="prefill: the beginning, in place of the rows' own targets")
    tokenizer: str | None = option(None, help="prefill: folder or Hub id of the model's tokenizer; world:llama")
    samples: int | None = option(None, help="best_of_n: answers to sample")
    temperature: float | None = option(None, help="best_of_n: at this temperature")
    prompt_column: str = option("prompt", help="prompts: column of the request, where there are no messages")
    target_column: str = option("target", help="prompts: column of the beginning of a compliant answer")
    parameters: dict[str, Any] | str | None = option(None, help="JSON object of parameters of your own function")

    @field_validator("attack", "strategies", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def __post_init__(self) -> None:
        if isinstance(self.parameters, str):
            try:
                self.parameters = json.loads(self.parameters)
            except json.JSONDecodeError as error:
                raise ValueError(f"parameters is not valid JSON: {error}") from error
            if not isinstance(self.parameters, dict):
                raise ValueError("parameters must be a JSON object")
        if not self.attack or not all(self.attack):
            raise ValueError("attack must be given")
        if self.guard and self.probe:
            raise ValueError("give a guard or a probe, not both")
        if self.guard_model and not self.guard:
            raise ValueError("guard_model belongs to a guard; give --guard")

    def given(self) -> dict[str, Any]:
        """The attack's parameters that were given."""
        own = {name: value for name in PARAMETERS if (value := vars(self)[name]) is not None}
        return own | (self.parameters if isinstance(self.parameters, dict) else {})
