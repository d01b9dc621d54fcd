"""Settings of `safeshape report`."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class ReportConfig:
    """Turn rows of results into tables, figures, one page and a safety card.

    Writes report.html, table.md, table.tex, table.csv, report.json and figures/*.png and *.svg. Every interval is 95 %.
    Answers stand on the page only where --answers asks for them; the safety card never holds any.
    """

    results: list[str] = option(help="results.json files, or folders that hold some at any depth; outcomes.json beside "
                                "one, where there is, makes comparisons prompt by prompt")  # fmt: skip
    output_dir: str = option(help="new folder for what is written")
    title: str = option("Safeshape report", help="title of the page")
    baseline: str | None = option(None, help="the defence that all others are compared with; marks are Holm-corrected")
    metrics: list[str] = field(default_factory=list, metadata={"help": "columns of the table, in order; default: all"})
    safety: list[str] = field(
        default_factory=lambda: ["attack_success"],
        metadata={"help": "metrics that should be low: on the y axes of figures"},
    )
    utility: list[str] = field(
        default_factory=lambda: ["task_accuracy"],
        metadata={"help": "metrics that should be high: on the x axes of scatter figures"},
    )
    answers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=FILE of conversations (JSONL) to show side by side, matched by prompt; their text goes on "
            "the page"
        },
    )
    limit: int = option(50, help="prompts shown side by side at most")
    card_into: str | None = option(
        None, help="folder of a saved model: write safety.json and the card in its README.md"
    )
    card_defence: str | None = option(None, help="which defence of the rows that model is; required with card_into")

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results must be given")
        if not self.output_dir:
            raise ValueError("output_dir must be given")
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if (self.card_into is None) != (self.card_defence is None):
            raise ValueError("give card_into and card_defence together")
        for entry in self.answers:
            if not all(entry.partition("=")[::2]):
                raise ValueError(f"answers must be given as NAME=FILE, got {entry!r}")
        names = [entry.partition("=")[0] for entry in self.answers]
        if len(set(names)) < len(names):
            raise ValueError("answers: a name is given twice")
