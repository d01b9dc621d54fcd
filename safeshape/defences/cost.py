"""What a defence costs beside plain fine-tuning, measured; and the table that shows it."""

import datetime
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from safeshape.defences.nested import text_only
from safeshape.defences.records import Context, Defence
from safeshape.defences.run import run_defence
from safeshape.defences.table import DEFENCES, resolve_defence
from safeshape.defences.trainer import DefendedTrainer
from safeshape.provenance import versions

COSTS = Path(__file__).parent / "costs.json"
_NEEDS = {"base_model": "base model", "harmful_data": "harmful data", "safe_data": "safe data"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """`per_step`: time of an update over that of plain fine-tuning, in the run that the defence changes.

    `once`: what it does before and after that run, in updates of plain fine-tuning.
    """

    per_step: float
    once: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every defence is timed on. `model` makes a fresh start each time it is called."""

    model: Callable[[], PreTrainedModel]
    base: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    args: Callable[[], SFTConfig]
    user_data: Dataset
    safe_data: Dataset
    harmful_data: Dataset


def clock() -> float:
    """Seconds: of this process's work on a CPU, which what else the machine does hardly changes; wall on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times the updates of a run."""

    def __init__(self) -> None:
        self.begun, self.seconds, self.updates = 0.0, 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called before the first update."""
        self.begun = clock()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the last."""
        self.seconds, self.updates = clock() - self.begun, state.global_step

    @property
    def per_update(self) -> float:
        """Seconds per update."""
        return self.seconds / self.updates


def _fine_tuning(bench: Bench, name: str) -> tuple[float, float]:
    """Seconds per update, and seconds of everything else."""
    watch, begun = Stopwatch(), clock()
    run_defence(
        name,
        bench.model(),
        bench.tokenizer,
        bench.args(),
        train_dataset=bench.user_data,
        base=bench.base(),
        safe_data=bench.safe_data,
        harmful_data=bench.harmful_data,
        callbacks=[watch],
        quiet=True,
    )
    return watch.per_update, clock() - begun - watch.seconds


def _alignment(bench: Bench, defence: Defence) -> float:
    """Seconds per update of the alignment run."""
    args = bench.args()
    context = Context(tokenizer=bench.tokenizer, args=args, safe_data=bench.safe_data, harmful_data=bench.harmful_data)
    watch = Stopwatch()
    trainer = DefendedTrainer(
        bench.model(),
        args,
        train_dataset=text_only(bench.safe_data),
        processing_class=bench.tokenizer,
        policy="sft",
        stepper=None if defence.stepper is None else defence.stepper(context),
        harmful_data=bench.harmful_data,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.per_update


def measure(
    bench: Bench, names: Sequence[str], *, repeats: int, progress: Callable[[int, int], None] = lambda d, t: None
) -> dict[str, Cost]:
    """The cost of each defence: the median over `repeats` of its run beside one of plain fine-tuning.

    A run of plain fine-tuning comes before each of them, so that what else the machine does from minute to minute
    weighs on both; one more comes before all, for nothing, so that nobody pays for what is loaded first.
    """
    _fine_tuning(bench, "sft")
    found: dict[str, Cost] = {}
    for place, name in enumerate(names):
        progress(place, len(names))
        defence = resolve_defence(name)
        pairs = [_pair(bench, defence, name) for _ in range(repeats)]
        found[name] = Cost(per_step=median(step for step, _ in pairs), once=max(median(once for _, once in pairs), 0.0))
    progress(len(names), len(names))
    return found


def _pair(bench: Bench, defence: Defence, name: str) -> tuple[float, float]:
    """Time of an update, and of everything else, in updates of a plain run made just before."""
    if defence.stage == "alignment":
        plain = _alignment(bench, resolve_defence("sft"))
        return _alignment(bench, defence) / plain, 0.0
    plain, besides = _fine_tuning(bench, "sft")
    step, other = _fine_tuning(bench, name)
    return step / plain, (other - besides) / plain


def device() -> str:
    """What the times are of: the GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0]}" if names else f"CPU {platform.processor() or platform.machine()}"


def record(costs: Mapping[str, Cost], **facts: Any) -> dict[str, Any]:
    """The figures as they are written, with date, device and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "world": True,
        **facts,
        "costs": {name: {"per_step": round(c.per_step, 2), "once": round(c.once, 1)} for name, c in costs.items()},
    }


def read_costs(path: Path) -> dict[str, Any]:
    """A file that `record` was written to. Errors: ValueError that names the file."""
    try:
        found = json.loads(path.read_text())
        costs = {name: Cost(per_step=float(c["per_step"]), once=float(c["once"])) for name, c in found["costs"].items()}
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read costs from {path}: {' '.join(str(error).split())}") from error
    return {**found, "costs": costs}


def needs_of(defence: Defence) -> str:
    """What it needs, in words."""
    words = [_NEEDS[need] for need in sorted(defence.needs - {"scores"})]
    if "scores" in defence.needs:
        words.append(" or ".join(defence.scores_by))
    return ", ".join(words) or "nothing"


def rows(costs: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """The table: one row a defence, in the order of `DEFENCES`."""
    found = []
    for name in DEFENCES:
        defence, cost = resolve_defence(name), costs.get(name)
        found.append(
            {
                "name": name,
                "stage": defence.stage,
                "per_step": None if cost is None else cost.per_step,
                "once": None if cost is None else cost.once,
                "needs": needs_of(defence),
                "source": defence.source,
                "differs": defence.differs,
            }
        )
    return found


def text(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal; what differs stands below each row."""
    head = f"{'defence':17}{'stage':13}{'cost':>7}{'+ once':>11}  {'needs':30}source"
    lines = [head]
    for row in table:
        cost = "-" if row["per_step"] is None else f"{row['per_step']:.2f}x"
        once = "" if row["once"] is None or round(row["once"]) == 0 else f"{row['once']:.0f} steps"
        lines.append(f"{row['name']:17}{row['stage']:13}{cost:>7}{once:>11}  {row['needs']:30}{row['source']}")
        if row["differs"]:
            lines.append(f"{'':17}Differs: {row['differs']}")
    return "\n".join(lines)
