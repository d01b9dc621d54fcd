"""The demo: user data with harmful examples, every policy, one table, in minutes and without a network."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from safeshape import world
from safeshape.config import DemoConfig
from safeshape.evals import rate_row, run_task
from safeshape.models import load
from safeshape.report import Trajectory, write_report, write_results
from safeshape.signals.column import score_dataset
from safeshape.signals.guards import load_guard
from safeshape.signals.probes import Probe
from safeshape.sources import refuse_used
from safeshape.trainer import SafeTrainer
from safeshape.types import Row, Score, Span
from safeshape.world import data as world_data

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the demo's table. `signal`: which scored data set it trains on."""

    name: str
    policy: Mapping[str, Any]
    signal: str = "star"


METHODS = (
    Method(name="sft", policy={"name": "sft"}),
    Method(name="rejection", policy={"name": "rejection"}),
    Method(name="fixed_kl", policy={"name": "fixed_kl"}),
    Method(name="constrained", policy={"name": "constrained"}),
    Method(name="star", policy={"name": "star"}),
    Method(name="adaptive (example)", policy={"name": "adaptive", "scope": "example"}, signal="probe"),
    Method(name="adaptive (batch)", policy={"name": "adaptive", "scope": "batch"}, signal="probe"),
)
BATCH, LEARNING_RATE = 8, 2e-4
PROBE_LAYERS = (-1,)  # leaving kinds out of the probe's own data prefers it too: see dev/LOG.md


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a run gives: rows of results, scored examples to look at, and facts about the run."""

    rows: tuple[Row, ...]
    trajectories: tuple[Trajectory, ...]
    facts: Mapping[str, str]


def score_user_data(config: DemoConfig, progress: Progress) -> dict[str, Dataset]:
    """The user's data, scored by the guard and by a probe on the frozen model."""
    plain = world_data.user_data(size=config.size, harmful_share=config.harmful_share, seed=config.seed)
    guard = load_guard("world", model=world.path("guard"))
    star = score_dataset(plain, guard.score_many, progress=lambda d, t: progress("guard scores every chunk", d, t))
    model, tokenizer = load(world.path(config.family))
    prompts, labels = world_data.probe_data(size=1000, seed=config.seed)
    probe = Probe.fit(prompts, labels, model=model, tokenizer=tokenizer, layers=PROBE_LAYERS, C=0.1, calibrate=False)
    probed = score_dataset(plain, probe.score_many, progress=lambda d, t: progress("probe scores prompts", d, t))
    return {"star": star, "probe": probed}


def fine_tune(
    method: Method, dataset: Dataset, config: DemoConfig, folder: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Full fine-tuning of the aligned model on the user's data under one policy."""
    model, tokenizer = load(world.path(config.family))
    args = SFTConfig(
        output_dir=folder,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        seed=config.seed,
        save_strategy="no",
        report_to="none",
        bf16=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    trainer = SafeTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, policy=method.policy)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, tokenizer


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, defence: str, config: DemoConfig) -> list[Row]:
    """All four rates on held-out prompts, judged by the world's oracle."""
    return [
        rate_row(
            run_task(task, model, tokenizer),
            attack=f"{config.harmful_share:.0%} harmful",
            defence=defence,
            model=f"world:{config.family}",
            seed=config.seed,
            judge="oracle",
            world=True,
        )
        for task in world_data.tasks(size=config.prompts, seed=config.seed)
    ]


def trajectories(scored: Dataset) -> tuple[Trajectory, ...]:
    """One scored training example of every origin."""
    found: dict[str, Trajectory] = {}
    for row in scored:
        if row["origin"] not in found:
            safety = row["safety"]
            spans = tuple(Span(**span) for span in safety["spans"])
            score = Score(signal=safety["signal"], p_safe=safety["p_safe"], spans=spans, scorer=safety["scorer"])
            user, answer = row["messages"]
            found[row["origin"]] = Trajectory(
                label=row["origin"].replace("_", " "), prompt=user["content"], answer=answer["content"], score=score
            )
    return tuple(found.values())


def run(config: DemoConfig, progress: Progress) -> Demo:
    """Score, train and evaluate everything, and write `report.html` and `results.json`.

    One CPU thread: models this small gain little from more, and waiting threads spin against other processes.
    Errors: ValueError when the output folder holds another run.
    """
    output = refuse_used(config.output_dir)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        demo = _measure(config, progress)
    finally:
        torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    write_results(output / "results.json", demo.rows)
    write_report(
        output / "report.html",
        title="Safeshape demo",
        rows=demo.rows,
        trajectories=demo.trajectories,
        facts=demo.facts,
    )
    return demo


def _measure(config: DemoConfig, progress: Progress) -> Demo:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    started = time.monotonic()
    data = score_user_data(config, progress)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for place, method in enumerate((None, *METHODS)):
            progress("policies trained and evaluated", place, len(METHODS) + 1)
            if method is None:
                model, tokenizer = load(world.path(config.family))
            else:
                model, tokenizer = fine_tune(method, data[method.signal], config, folder)
            rows += evaluate(model, tokenizer, "untouched" if method is None else method.name, config)
        progress("policies trained and evaluated", len(METHODS) + 1, len(METHODS) + 1)
    facts = {
        "Model": f"world:{config.family}, about 0.9 million parameters, full fine-tuning",
        "User data": f"{config.size} rows, {config.harmful_share:.0%} harmful, 70 % of those turn midway",
        "Training": f"{config.epochs} epochs, batch {BATCH}, learning rate {LEARNING_RATE:g}, for every policy",
        "Judge": "the world's oracle, exact; guard and probe, which train, do not evaluate",
        "Seeds": f"one (seed {config.seed}); intervals cover the prompts, not the training",
        "Duration": f"{time.monotonic() - started:.0f} s on one CPU thread",
    }
    return Demo(rows=tuple(rows), trajectories=trajectories(data["star"]), facts=facts)
