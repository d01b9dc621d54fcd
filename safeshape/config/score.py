"""Settings of `safeshape score`."""

from dataclasses import field
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option
from safeshape.config.scoring import ScoringSettings


@dataclass(config=STRICT, kw_only=True)
class ScoreConfig(ScoringSettings):
    """Score every partial answer of a dataset with a guard (STAR) and write it with a `safety` column.

    A killed run goes on where it was when it is started again. `safeshape score calibrate`, `safeshape score view` and
    `safeshape score export` work on scored data; `safeshape score antibody` scores without a guard. Each has its own
    --help.
    """

    guard: list[str] = field(
        default_factory=lambda: ["world"],
        metadata={"help": "row of the guard table, or a YAML file with a row; several, or a+b, are combined"},
    )
    guard_model: list[str] = field(
        default_factory=list,
        metadata={"help": "folder or Hub id of the guard's weights, where not the row's own; one for each guard"},
    )
    combine: Literal["mean", "min"] = option("mean", help="how the scores of several guards become one")
    revision: str | None = option(None, help="revision of the guard on the Hub")
    sharpen: bool = option(False, help="true: the near-hard scores of the STAR paper's released code")
    chunk: int = option(5, help="units per chunk")
    unit: Literal["words", "tokens", "sentences"] = option("words", help="what a chunk counts")
    refine: bool = option(
        False,
        help="true: score coarsely, halve only where the score moves; not exact: short unsafe stretches may be missed",
    )
    tolerance: float = option(0.05, help="refine: how much a score may move over a chunk that is not halved")
    calibration: str | None = option(
        None, help="a calibration.json of `safeshape score calibrate` for this very guard: scores are mapped by it"
    )
    batch_size: int = option(64, help="partial answers per forward")
    device: str = option("cpu", help="torch device of the guard")
    dtype: str = option("float32", help="torch dtype of the guard's weights")
    engine: Literal["local", "ray"] = option("local", help="score in this process, or with actors of Ray Data")
    actors: int = option(2, help="ray: how many actors, each with a guard of its own")
    server: str | None = option(None, help="address of an OpenAI-compatible server that runs the guard's weights")
    server_model: str | None = option(None, help="server: the guard's name there")
    tokenizer: str | None = option(None, help="server: folder or Hub id of the guard's tokenizer and chat template")
    concurrency: int = option(16, help="server: requests at once")
    timeout: float = option(60.0, help="server: seconds for one try of a request")
    retries: int = option(5, help="server: further tries of a request")
    top_logprobs: int = option(20, help="server: how many of the likeliest tokens it lists")
    api_key_variable: str = option(
        "OPENAI_API_KEY", help="server: name of the environment variable that holds the key; local servers need none"
    )

    @field_validator("guard", "guard_model", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list):
            return given
        return [part for name in given for part in (name.split("+") if isinstance(name, str) else [name])]

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.batch_size < 1 or self.actors < 1:
            raise ValueError("chunk, batch_size and actors must be at least 1")
        if not self.guard or not all(self.guard):
            raise ValueError("guard must be given")
        if len(set(self.guard)) < len(self.guard) and not self.guard_model:
            raise ValueError("the same guard is given twice")
        if self.guard_model and len(self.guard_model) != len(self.guard):
            raise ValueError(f"there are {len(self.guard)} guards but {len(self.guard_model)} guard_model")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if self.server is None:
            if self.server_model or self.tokenizer:
                raise ValueError("server_model and tokenizer belong to a server; give --server")
            return
        if len(self.guard) > 1 or self.guard_model:
            raise ValueError("a server runs one guard; give no second guard and no guard_model")
        if not self.server_model or not self.tokenizer:
            raise ValueError("server needs server_model and tokenizer")
        if self.engine == "ray":
            raise ValueError("engine ray runs guards of its own; with a server leave engine local")
        if self.refine or self.sharpen:
            raise ValueError("refine and sharpen need the guard in this process; leave out --server")
        if not self.api_key_variable.isidentifier():  # not repeated here: it may be the key itself
            raise ValueError("api_key_variable must be the name of an environment variable, never the key")
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0 or self.top_logprobs < 1:
            raise ValueError("concurrency and top_logprobs must be at least 1, timeout above 0, retries at least 0")
