"""Settings of `safeshape probe score`."""

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option
from safeshape.config.scoring import ScoringSettings


@dataclass(config=STRICT, kw_only=True)
class ProbeScoreConfig(ScoringSettings):
    """Score the requests of a dataset with an activation probe and write it with a `safety` column.

    A killed run goes on where it was when it is started again.
    """

    probe: str = option(help="folder of a probe, as `safeshape probe fit` writes it")
    model: str | None = option(None, help="where the probe's model is now, if not where it was fitted")
    batch_size: int = option(64, help="prompts per forward")
    device: str = option("cpu", help="torch device of the model")
    dtype: str = option("float32", help="torch dtype of the model")
    revision: str = option("main", help="revision of the model on the Hub")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
