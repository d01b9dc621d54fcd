"""Settings of `safeshape bench`."""

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class BenchConfig:
    """Run a matrix of attack, defence, model and seed, one folder a cell, and collect the rows.

    The matrix stands in the --config file: `experiments` (a name each, with model, attack, defence, seed and settings;
    lists multiply), `settings` of all of them, and `scales`, which replace entries by name. A killed run goes on where
    it was; a cell that fails is listed and does not stop the others.
    """

    output_dir: str = option(help="folder for the cells, results.json, outcomes.json and failures.json")
    experiments: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "name to model, attack, defence, seed and settings"}
    )
    settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of all experiments"})
    scales: dict[str, Any] = field(default_factory=dict, metadata={"help": "name to entries that replace others"})
    scale: str = option("default", help="which of the matrix's scales to run")
    only: list[str] = field(default_factory=list, metadata={"help": "run these experiments of the matrix alone"})
    jobs: int = option(1, help="cells at a time, each in a process of its own")
    engine: Literal["local", "ray"] = option("local", help="run cells here, or as tasks of a Ray cluster")
    timeout: float = option(3600.0, help="local: seconds after which a cell counts as failed")
    page: Literal["", "reproduction", "defences"] = option(
        "",
        help="write a page as Markdown too: reproduction (the two papers' numbers beside these) or defences (every "
        "method under every attack); each for its own matrix in recipes/bench",
    )
    notes: str | None = option(None, help="page: a YAML file with our reading of each experiment's result")

    def __post_init__(self) -> None:
        if not self.experiments:
            raise ValueError("the matrix has no experiments; give a --config file with `experiments`")
        if self.notes is not None and not self.page:
            raise ValueError("notes are shown on a page; give --page too")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be above 0, got {self.timeout}")
        for name in self.only:
            if name not in self.experiments:
                raise ValueError(f"the matrix has no experiment {name!r}; it has: {', '.join(self.experiments)}")
