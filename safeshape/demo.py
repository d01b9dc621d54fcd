"""The demo: user data with harmful examples, every policy, one table, in minutes and without a network."""

import random
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
from safeshape.onpolicy import OnPolicy
from safeshape.report import Trajectory, write_report, write_results
from safeshape.signals.column import score_dataset
from safeshape.signals.guards import load_guard
from safeshape.signals.probes import Probe
from safeshape.sources import refuse_used
from safeshape.trainer import SafeTrainer
from safeshape.types import Row, Score, Span
from safeshape.world import data as world_data
from safeshape.world.judge import OracleJudge

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the demo's table. `signal`: which scored data set it trains on.

    `mean_of`: an earlier row, whose mean KL weight over all tokens it trained on becomes this one's beta. `on_policy`:
    a judge rates the model's own answers; the data then carry no scores.
    """

    name: str
    policy: Mapping[str, Any]
    signal: str = "star"
    mean_of: str | None = None
    on_policy: bool = False


PROBED, JUDGED = "adaptive, probe", "adaptive, judge"
CLAMP = {"ramp": "clamp"}  # as the released code does with a judge's five scores
METHODS = (
    Method(name="sft", policy={"name": "sft"}),
    Method(name="rejection", policy={"name": "rejection"}),
    Method(name="fixed_kl", policy={"name": "fixed_kl"}),
    Method(name="constrained", policy={"name": "constrained"}),
    Method(name="star", policy={"name": "star"}),
    Method(name=PROBED, policy={"name": "adaptive"}, signal="probe"),
    Method(name="adaptive, probe, per batch", policy={"name": "adaptive", "scope": "batch"}, signal="probe"),
    Method(name="probe: weights without KL", policy={"name": "adaptive_weight"}, signal="probe"),
    Method(name="probe: fixed KL, same mean", policy={"name": "fixed_kl"}, signal="probe", mean_of=PROBED),
    Method(name="probe: shuffled risk", policy={"name": "adaptive"}, signal="shuffled probe"),
    Method(name="probe: rejection", policy={"name": "rejection"}, signal="probe"),
    Method(name=JUDGED, policy={"name": "adaptive", **CLAMP}, signal="judge"),
    Method(name="judge: weights without KL", policy={"name": "adaptive_weight", **CLAMP}, signal="judge"),
    Method(name="judge: fixed KL, same mean", policy={"name": "fixed_kl"}, signal="judge", mean_of=JUDGED),
    Method(name="judge: shuffled risk", policy={"name": "adaptive", **CLAMP}, signal="shuffled judge"),
    Method(
        name="adaptive, judge on policy, per batch",
        policy={"name": "adaptive", "scope": "batch"},
        signal="plain",
        on_policy=True,
    ),
)
BATCH, LEARNING_RATE = 8, 2e-4
JUDGE_ERRORS, JUDGE_EVERY = 0.1, 10
PROBE_LAYERS = (-1,)  # leaving kinds out of the probe's own data prefers it too: see dev/LOG.md


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a run gives: rows of results, scored examples to look at, and facts about the run."""

    rows: tuple[Row, ...]
    trajectories: tuple[Trajectory, ...]
    facts: Mapping[str, str]


def score_user_data(config: DemoConfig, progress: Progress) -> dict[str, Dataset]:
    """The user's data, scored by the guard, by a probe on the frozen model, and by a judge that errs."""
    plain = world_data.user_data(size=config.size, harmful_share=config.harmful_share, seed=config.seed)
    guard = load_guard("world", model=world.path("guard"))
    star = score_dataset(plain, guard.score_many, progress=lambda d, t: progress("guard scores every chunk", d, t))
    model, tokenizer = load(world.path(config.family))
    prompts, labels = world_data.probe_data(size=1000, seed=config.seed)
    probe = Probe.fit(prompts, labels, model=model, tokenizer=tokenizer, layers=PROBE_LAYERS)
    probed = score_dataset(plain, probe.score_many, progress=lambda d, t: progress("probe scores prompts", d, t))
    judged = score_dataset(plain, OracleJudge(JUDGE_ERRORS, seed=config.seed).score_many)
    found = {"plain": plain, "star": star, "probe": probed, "judge": judged}
    return found | {f"shuffled {name}": shuffled_risk(found[name], seed=config.seed) for name in ("probe", "judge")}


def shuffled_risk(dataset: Dataset, *, seed: int) -> Dataset:
    """Control: the same scores, dealt out to the rows by chance."""
    order = list(range(len(dataset)))
    random.Random(f"shuffled risk/{seed}").shuffle(order)
    column = dataset["safety"]
    return dataset.remove_columns("safety").add_column("safety", [column[index] for index in order])


def fine_tune(
    method: Method, dataset: Dataset, config: DemoConfig, folder: str, means: Mapping[str, float]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, float]:
    """Full fine-tuning of the aligned model on the user's data under one policy, and its mean KL weight.

    `means`: the mean KL weights of the rows before.
    """
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
    judge = OracleJudge(JUDGE_ERRORS, seed=config.seed)
    judged = OnPolicy(judge=judge, every=JUDGE_EVERY, max_new_tokens=64, wait_s=60.0)
    trainer = SafeTrainer(
        model,
        args,
        train_dataset=dataset,
        processing_class=tokenizer,
        policy=dict(method.policy) | ({} if method.mean_of is None else {"beta": means[method.mean_of]}),
        on_policy=judged if method.on_policy else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # Nothing was logged before, so the last entry has the means of the whole run.
    return model, tokenizer, float(trainer.state.log_history[-1]["kl_weight"])


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
    means: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for place, method in enumerate((None, *METHODS)):
            progress("policies trained and evaluated", place, len(METHODS) + 1)
            if method is None:
                model, tokenizer = load(world.path(config.family))
            else:
                model, tokenizer, means[method.name] = fine_tune(method, data[method.signal], config, folder, means)
            rows += evaluate(model, tokenizer, "untouched" if method is None else method.name, config)
        progress("policies trained and evaluated", len(METHODS) + 1, len(METHODS) + 1)
    facts = {
        "Model": f"world:{config.family}, about 0.9 million parameters, full fine-tuning",
        "User data": f"{config.size} rows, {config.harmful_share:.0%} harmful, 70 % of those turn midway",
        "Training": f"{config.epochs} epochs, batch {BATCH}, learning rate {LEARNING_RATE:g}, for every policy",
        "Evaluation": "by the world's oracle, exact; guard, probe and judge, which train, do not evaluate",
        "Judge": f"the world's oracle made wrong on {JUDGE_ERRORS:.0%} of conversations, safe and harmful; on policy "
        f"it rates the model's and the reference's answers every {JUDGE_EVERY} steps",
        "Mean KL weight of a token": "; ".join(f"{name} {mean:.3f}" for name, mean in means.items() if mean > 0),
        "Seeds": f"one (seed {config.seed}); intervals cover the prompts, not the training",
        "Duration": f"{time.monotonic() - started:.0f} s on one CPU thread",
    }
    return Demo(rows=tuple(rows), trajectories=trajectories(data["star"]), facts=facts)
