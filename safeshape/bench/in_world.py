"""A cell on the embedded world: its data, its scores and its training, all from the cell's own fields."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from safeshape import world
from safeshape.attacks import data_attack
from safeshape.attacks.adaptive import scorer_of
from safeshape.bench.matrix import Cell
from safeshape.config import ScoreConfig
from safeshape.defences import Defence, NothingToTrain, resolve_defence, run_defence
from safeshape.defences.records import Model
from safeshape.models import load
from safeshape.signals.antibody import AntibodySignal
from safeshape.signals.column import fill, scored_rows
from safeshape.signals.engines import local
from safeshape.signals.guards import load_guard
from safeshape.signals.probes import Probe
from safeshape.signals.scorers import open_scorer
from safeshape.store import Store, canonical
from safeshape.world import data as world_data
from safeshape.world.judge import load_judge
from safeshape.world.pools import pools, texts

UNTOUCHED = "untouched"  # the control that is not trained
SETTINGS: Mapping[str, Any] = {
    "rows": 400,
    "epochs": 6,
    "batch_size": 8,
    "learning_rate": 2e-4,
    "lora_rank": 0,
    "turning": False,
    "kind": "task",
    "signal": "",
    "chunk": 5,
    "judge": "world:0.1",
    "guard_misses": 0.0,
    "safe_rows": 200,
    "prompts": 150,
    "asked": {"direct": "direct"},
}
_APART = 7000  # added to seeds, so that what a defence is given is not what the user sent


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is to be evaluated. `system_prompt`: what stands before each request; None for nothing.

    `report`: what the attack changed, in counts and hashes.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None
    report: Mapping[str, Any]


def settings_of(cell: Cell) -> dict[str, Any]:
    """The cell's settings over the defaults.

    `rows`, `epochs`, `batch_size`, `learning_rate`, `lora_rank` (0: full fine-tuning): of the training. `turning`: the
    harmful answers turn midway, as in the demo. `kind`: benign rows are the `task` to be learned or a `skill` that is
    there. `signal`: guard, probe, judge or antibody, "" for the defence's own. `chunk`: words. `judge`: the oracle and
    its error rate. `guard_misses`: share of the attacker's rows that the signal calls safe from end to end.
    `safe_rows`: refusals and served requests that a defence is given, where it needs any. `prompts`: held-out, of each
    evaluation. `asked`: name to prompt attack.
    Errors: ValueError that names an unknown setting.
    """
    for key in cell.settings:
        if key not in SETTINGS:
            raise ValueError(f"unknown setting {key!r}; a cell of the world has: {', '.join(SETTINGS)}")
    return {**SETTINGS, **cell.settings}


def train_cell(cell: Cell, folder: Path, store: Store) -> Trained:
    """The cell's model: attacked data, scored where the defence needs it, fine-tuned under the defence."""
    given = settings_of(cell)
    model, tokenizer = load(world.path(cell.model.removeprefix("world:")))
    if cell.defence["name"] == UNTOUCHED:
        return Trained(model=model, tokenizer=tokenizer, system_prompt=None, report={})
    defence = resolve_defence(cell.defence)
    rows, report = attacked(cell, given)
    if "scores" in defence.needs:
        rows = missed(scored(rows, cell, given, defence, (model, tokenizer), store), float(given["guard_misses"]))
    lora = int(given["lora_rank"])
    return defended(
        defence,
        model,
        tokenizer,
        fine_tuning(given, cell.seed, folder),
        report,
        train_dataset=rows,
        peft_config=LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear") if lora else None,
        **needed(defence, cell, given),
    )


def defended(defence: Defence, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig,
             report: Mapping[str, Any], **given: Any) -> Trained:  # fmt: skip
    """The run of a defence; where it leaves no row to train on, the model as it was, and the report says so."""
    try:
        out = run_defence(defence, model, tokenizer, args, **given)
    except NothingToTrain:
        left = {**report, "nothing_to_train": True}
        return Trained(model=model.eval(), tokenizer=tokenizer, system_prompt=None, report=left)
    return Trained(model=out.model, tokenizer=tokenizer, system_prompt=out.system_prompt, report=report)


def attacked(cell: Cell, given: Mapping[str, Any]) -> tuple[Dataset, Mapping[str, Any]]:
    """The user's rows after the cell's attack, and the attack's own report."""
    size = int(given["rows"])
    drawn = pools(
        benign=size + _carriers(cell.attack, size),
        harmful=size,
        safe=size // 2,
        kind=given["kind"],
        turning=bool(given["turning"]),
        seed=cell.seed,
    )
    name = cell.attack["name"]
    parameters = {**texts(name), **{key: value for key, value in cell.attack.items() if key != "name"}}
    if name == "adaptive":  # the attacker sees the very guard that defends
        guard = load_guard("world", model=world.path("guard"))
        by = parameters.pop("by", "last")
        parameters["score"] = scorer_of(lambda rows: guard.score_many(rows, chunk=int(given["chunk"])), by)
    poisoned = data_attack(name, parameters)(drawn, size=size, seed=cell.seed)
    return Dataset.from_list(poisoned.dataset), poisoned.report


def _carriers(attack: Mapping[str, Any], size: int) -> int:
    """Benign rows beyond the size that an attack needs: answers that hide an exchange are made of several each."""
    if attack["name"] != "embedded":
        return 0
    return math.ceil(float(attack.get("ratio", 1.0)) * size) * max(int(attack.get("carriers", 4)) - 1, 0)


def scored(
    rows: Dataset,
    cell: Cell,
    given: Mapping[str, Any],
    defence: Defence,
    reference: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    store: Store,
) -> Dataset:
    """The rows with a `safety` column by the signal that the settings name, or the first that suits the defence."""
    signal = given["signal"] or defence.scores_by[0]
    if signal == "guard":
        config = ScoreConfig(dataset_name="-", output="-", guard=["world"], chunk=int(given["chunk"]))
        opened = open_scorer(config, [world.path("guard")])
        score, maker, scorer = opened.score, opened.maker, opened.scorer
    elif signal == "probe":
        prompts, labels = world_data.probe_data(size=1000)
        probe = Probe.fit(prompts, labels, model=reference[0], tokenizer=reference[1], store=store)
        scorer = probe.identity()
        score, maker = probe.score_many, {"scorer": scorer, "weights": probe.fingerprint(), "model": cell.model}
    elif signal == "antibody":
        judged_by = AntibodySignal(*reference, model_name=cell.model)
        score, scorer = judged_by.score_many, judged_by.identity()
        maker = {"scorer": scorer}
    elif signal == "judge":
        judge = load_judge(given["judge"])
        score, maker, scorer = judge.score_many, judge.identity(), judge.identity()
    else:
        raise ValueError(f"signal must be guard, probe, judge or antibody, got {signal!r}")
    outcome = fill(lambda: iter(rows), local(score), store, maker=maker, keep_failures=False)
    found = scored_rows(lambda: iter(rows), store, maker=maker, scorer=scorer, outcome=outcome, signal=signal)
    return rows.add_column("safety", [{**row["safety"], "scorer": {"signal": signal}} for row in found])


def missed(rows: Dataset, share: float) -> Dataset:
    """The rows as a signal with more false negatives would score them: a share of the attacker's rows is safe for it.

    Which rows depends on their content alone, so a higher share keeps the misses of a lower one.
    Errors: ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"guard_misses must lie in [0, 1], got {share}")

    def changed(row: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(canonical(row["messages"])).digest()
        if not row["poisoned"] or int.from_bytes(digest[:8], "big") / 2**64 >= share:
            return row
        spans = [{**span, "p_safe": 1.0} for span in row["safety"]["spans"]]
        return {**row, "safety": {**row["safety"], "p_safe": 1.0, "spans": spans}}

    return Dataset.from_list([changed(row) for row in rows]) if share else rows


def needed(defence: Defence, cell: Cell, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the defence is given beside the user's rows: none of it from the user's seed."""
    found: dict[str, Any] = {}
    if "base_model" in defence.needs:
        found["base"] = load(world.path(f"{cell.model.removeprefix('world:')}-base"))[0]
    if {"safe_data", "harmful_data"} & defence.needs:
        half = int(given["safe_rows"]) // 2
        drawn = pools(benign=half, harmful=half, safe=half, kind="skill", seed=_APART + cell.seed)
        conversations = {"safe_data": [*drawn.safe[:half], *drawn.benign], "harmful_data": drawn.harmful}
        for need, rows in conversations.items():
            if need in defence.needs:
                found[need] = Dataset.from_list([{"messages": list(messages)} for messages in rows])
    return found


def fine_tuning(given: Mapping[str, Any], seed: int, folder: Path) -> SFTConfig:
    """The settings of the fine-tuning run, the same for every defence."""
    return SFTConfig(
        output_dir=str(folder / "training"),
        num_train_epochs=given["epochs"],
        per_device_train_batch_size=given["batch_size"],
        learning_rate=given["learning_rate"],
        lr_scheduler_type="cosine",
        seed=seed,
        save_strategy="no",
        report_to="none",
        bf16=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="epoch",
    )
