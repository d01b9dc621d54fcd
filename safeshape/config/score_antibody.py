"""Settings of `safeshape score antibody`."""

from typing import Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class AntibodyScoreConfig:
    """Score answers by a frozen model alone, without guard or judge: one that it finds likelier than a refusal is safe.

    After Antibody (arXiv 2603.00498). A killed run goes on where it was when it is started again.
    """

    dataset_name: str = option(
        help="a JSONL, JSON, CSV or Parquet file, a folder of JSONL or Parquet shards, a saved dataset, or a Hub id"
    )
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    model_name_or_path: str = option(
        help="the aligned model: a folder, a Hub id, or world:llama, world:qwen3, world:phi3"
    )
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    refusal: str = option("I cannot help with that.", help="the refusal that answers are compared with")
    tau: float = option(1.0, help="temperature: nats per token in which one answer is likelier, per unit of logit")
    batch_size: int = option(16, help="answers per forward")
    device: str = option("cpu", help="torch device of the model")
    dtype: str = option("float32", help="torch dtype of the model")
    revision: str = option("main", help="revision of the model on the Hub")
    store: str | None = option(None, help="file that keeps scores as they arrive (default: OUTPUT.store.sqlite)")
    on_error: Literal["stop", "keep"] = option(
        "stop", help="a row that fails: stop, or keep it with p_safe null and the reason"
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")
        if not self.refusal.strip():
            raise ValueError("refusal must be a text")
