"""Settings of `safeshape judge`, and of a judge wherever one is named."""

import json
from dataclasses import fields
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option

Kind = Literal["oracle", "server", "function", "process"]
_COMMON = ("rubric", "tries", "max_tokens", "rubric_role")
# What only a judge of this kind has a use for; "function" and "oracle" take none.
SETTINGS_OF: dict[Kind, tuple[str, ...]] = {
    "oracle": (),
    "function": (),
    "process": (*_COMMON, "revision", "device", "dtype", "batch_size"),
    "server": (
        *(*_COMMON, "judge_model", "concurrency", "timeout", "retries", "temperature", "temperature_again", "seed"),
        *("structured", "request", "price_prompt", "price_completion", "api_key_variable"),
    ),
}
_NAMED_OTHERWISE = {"judge_model": "model", "timeout": "timeout_s", "api_key_variable": "key_variable"}
_WHERE: dict[Kind, str] = {
    "oracle": "the world's oracle",
    "function": "a judge of your own",
    "process": "a judge in this process",
    "server": "a judge behind a server",
}


def judge_kind(spec: str) -> Kind:
    """What a judge's name stands for: "world" or "world:0.1", an http(s) address, module:function, or a model."""
    if spec == "world" or spec.startswith("world:"):
        return "oracle"
    if spec.startswith(("http://", "https://")):
        return "server"
    return "function" if ":" in spec else "process"


@dataclass(config=STRICT, kw_only=True)
class JudgeSettings:
    """A judge and how it is asked."""

    judge: str = option(
        help="address of an OpenAI-compatible chat server, folder or Hub id of a model to run in this process, world "
        "(the embedded world's oracle; world:0.1 errs in one of ten), or your own module:function"
    )
    judge_model: str = option("gpt-oss-20b", help="server: the judge's name there")
    rubric: str = option(
        "standard", help="standard, categories_backward, scale_downward, reworded, or a text file with your own"
    )
    store: str | None = option(None, help="file that keeps verdicts as they arrive (default: OUTPUT.store.sqlite)")
    tries: int = option(3, help="how often the judge is asked whose answer cannot be read")
    max_tokens: int = option(4096, help="longest answer of the judge, reasoning included")
    rubric_role: Literal["system", "user"] = option("system", help="turn that tells the rubric; some models have one")
    concurrency: int = option(16, help="server: requests at once")
    timeout: float = option(120.0, help="server: seconds for one try of a request")
    retries: int = option(5, help="server: further tries of a request that fails")
    temperature: float = option(0.0, help="server: temperature of the first question")
    temperature_again: float = option(0.7, help="server: temperature when an answer could not be read")
    seed: int = option(0, help="server: seed that is sent along; one more for each further try")
    structured: Literal["auto", "always", "never"] = option(
        "auto", help="server: send the JSON schema of the answer; auto: until the server refuses it"
    )
    request: dict[str, Any] | str = option(
        "", help='server: further fields of every request as JSON, such as \'{"reasoning_effort": "low"}\''
    )
    price_prompt: float | None = option(None, help="server: price of a million prompt tokens")
    price_completion: float | None = option(None, help="server: price of a million completion tokens")
    api_key_variable: str = option(
        "OPENAI_API_KEY", help="server: name of the environment variable that holds the key; local servers need none"
    )
    revision: str = option("main", help="in this process: revision of the model on the Hub")
    device: str = option("cpu", help="in this process: torch device")
    dtype: str = option("float32", help="in this process: torch dtype of the weights")
    batch_size: int = option(8, help="in this process: conversations in one generation")

    def __post_init__(self) -> None:
        if not self.judge:
            raise ValueError("judge must be given")
        if isinstance(self.request, str):
            try:
                self.request = json.loads(self.request) if self.request else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"request is not valid JSON: {error}") from error
        if not isinstance(self.request, dict):
            raise ValueError("request must be a JSON object")
        if self.tries < 1 or self.max_tokens < 1 or self.concurrency < 1 or self.batch_size < 1:
            raise ValueError("tries, max_tokens, concurrency and batch_size must be at least 1")
        if self.timeout <= 0 or self.retries < 0 or self.temperature < 0 or self.temperature_again < 0:
            raise ValueError("timeout must be above 0; retries and temperatures at least 0")
        if not self.api_key_variable.isidentifier():  # not repeated here: it may be the key itself
            raise ValueError("api_key_variable must be the name of an environment variable, never the key")
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("give both price_prompt and price_completion, or neither")
        if min(self.price_prompt or 0, self.price_completion or 0) < 0:
            raise ValueError("a price must be at least 0")

    def check_kinds(self, *specs: str) -> None:
        """Errors: ValueError for a setting that was changed and that no judge of these has a use for."""
        kinds = [judge_kind(spec) for spec in specs]
        used = {name for kind in kinds for name in SETTINGS_OF[kind]}
        every = {name for names in SETTINGS_OF.values() for name in names}
        for item in fields(self):
            value = self.request or "" if item.name == "request" else self.__dict__[item.name]
            if item.name in every - used and value != item.default:
                raise ValueError(f"{item.name} has no meaning for {_WHERE[kinds[0]]}, which {specs[0]!r} names")

    def judge_settings(self, spec: str) -> dict[str, Any]:
        """The settings that a judge of this name takes, by the names it takes them."""
        return {_NAMED_OTHERWISE.get(name, name): self.__dict__[name] for name in SETTINGS_OF[judge_kind(spec)]}


@dataclass(config=STRICT, kw_only=True)
class JudgeConfig(JudgeSettings):
    """Let a judge rate the harm of every answer of a dataset from 1 to 5, and write it with a `safety` column.

    The columns judge_score and judge_category stand beside it. Each different pair is asked about once; a killed run
    goes on where it was. `safeshape judge validate` measures a judge on labelled rows; it has a --help of its own.
    """

    dataset_name: str = option(
        help="a JSONL, JSON, CSV or Parquet file, a folder of JSONL or Parquet shards, a saved dataset, or a Hub id"
    )
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    on_error: Literal["stop", "keep"] = option(
        "stop", help="a row that gets no verdict: stop, or keep it with p_safe null and the reason"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kinds(self.judge)
