"""Settings of `safeshape train`."""

import json
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class TrainConfig:
    """Fine-tune a model with a safety policy."""

    dataset_name: str = option(help="a JSONL, JSON, CSV or Parquet file, a saved dataset folder, or a Hub id")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    policy: dict[str, Any] | str | None = option(
        "star", help='a policy name, a JSON object such as \'{"name": "star", "kl": 0.5}\', or your own module:function'
    )
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
    probe: str | None = option(None, help="score rows first with the activation probe saved in this folder")

    def __post_init__(self) -> None:
        if isinstance(self.policy, str) and self.policy.startswith("{"):
            try:
                self.policy = json.loads(self.policy)
            except json.JSONDecodeError as error:
                raise ValueError(f"policy is not valid JSON: {error}") from error
        if self.policy is None:
            raise ValueError("policy must be given")
        if self.gradient_floor < 0:
            raise ValueError(f"gradient_floor must be at least 0, got {self.gradient_floor}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.guard and self.probe:
            raise ValueError("give a guard or a probe, not both")
