"""Settings of `safeshape eval theorem`."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from safeshape.config.parser import STRICT, option


@dataclass(config=STRICT, kw_only=True)
class EvalTheoremConfig:
    """Measure what Theorem 1 of STAR-DSS says of a tuned model: its harm, its divergence, and what the guard misses.

    Answers are drawn at temperature 1 from the whole vocabulary. Writes theorem.json, theorem.txt, theorem.png and
    theorem.svg; no prompt and no answer is written.
    """

    model_name_or_path: str = option(
        help="the tuned model: a folder, a Hub id, or world:llama, world:qwen3, world:phi3"
    )
    reference: str = option(help="the model it was tuned from, in the same forms")
    output_dir: str = option(help="new folder for what is written")
    tasks: str = option("world", help="world: the embedded world's held-out harmful requests; or a dataset of harmful "
                        "prompts (`messages` without an answer, or `prompt`)")  # fmt: skip
    judge: str = option(
        "world", help="world: the embedded world's exact oracle; or your own module:function(messages, answer) -> bool"
    )
    guard: str = option("world", help="a row of the guard table, or a YAML file with one")
    guard_model: str | None = option(None, help="folder or Hub id of the guard's weights, where not the row's own")
    prompts: int = option(150, help="prompts used at most; the world has up to 170")
    samples: int = option(1, help="answers drawn for each prompt and model")
    chunks: list[int] = field(
        default_factory=lambda: [1, 5, 10], metadata={"help": "words per chunk of the guard's score, one grid row each"}
    )
    taus: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9], metadata={"help": "thresholds, one grid column each"}
    )
    max_new_tokens: int = option(64, help="tokens after which an answer is cut; the share of cut ones is reported")
    batch_size: int = option(32, help="answers of one forward")
    seed: int = option(0, help="seed of the answers and of the bootstrap")
    dtype: str = option("float32", help="precision of both models")
    device: str = option("cpu", help="where both models and the guard run")

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise ValueError(f"prompts must be at least 2, got {self.prompts}")
        if (self.tasks == "world") != (self.judge == "world"):
            raise ValueError("the world's oracle judges the world's requests only; give both tasks and judge")
        if self.judge != "world" and not all(self.judge.partition(":")[::2]):
            raise ValueError(f"judge must be world or module:function, got {self.judge!r}")
