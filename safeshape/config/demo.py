"""Settings of `safeshape demo`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class DemoConfig:
    """Show an aligned model losing its safety under plain fine-tuning and keeping it under Safeshape."""

    output_dir: str = option("demo-output", help="folder for report.html and results.json")
    family: Literal["llama", "qwen3", "phi3"] = option("llama", help="which model of the embedded world")
    seed: int = option(0, help="seed of data, training and evaluation")
    size: int = option(400, help="rows of user data")
    harmful_share: float = option(0.2, help="share of them that is harmful")
    prompts: int = option(150, help="held-out prompts per evaluation")
    epochs: int = option(6, help="epochs of fine-tuning; qwen3 and phi3 need more to learn the task")

    def __post_init__(self) -> None:
        if not 20 <= self.size <= 500:
            raise ValueError(f"size must be 20 to 500 (the world has no more different notes), got {self.size}")
        if not 0 < self.harmful_share < 1:
            raise ValueError(f"harmful_share must lie between 0 and 1, got {self.harmful_share}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not 10 <= self.prompts <= 170:
            raise ValueError(f"prompts must be 10 to 170, got {self.prompts}")
