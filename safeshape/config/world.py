"""Settings of `safeshape world`."""

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class WorldConfig:
    """Build the embedded world's models from a seed, or say where the shipped ones are."""

    action: Literal["build", "show"] = option("show", help="build: train them anew; show: list the shipped ones")
    output_dir: str | None = option(None, help="build: a new or empty folder for the models")
    seed: int = option(0, help="build: seed; the shipped models are from seed 0")
    only: list[str] = field(
        default_factory=lambda: ["llama", "qwen3", "phi3", "llama-base", "guard"],
        metadata={"help": "build: which models; FAMILY-base is a family before its alignment"},
    )

    def __post_init__(self) -> None:
        if self.action == "build" and self.output_dir is None:
            raise ValueError("output_dir must be given to build")
