"""A cell on a user's own model and files: pools to attack, a critic for the scores, held-out requests and a judge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape import world
from safeshape.attacks import Attacked, Pools, data_attack
from safeshape.attacks.records import POOLS
from safeshape.attacks.rows import conversations_of, prompts_of
from safeshape.bench.in_world import UNTOUCHED, Trained, defended, fine_tuning
from safeshape.bench.matrix import Cell
from safeshape.config import ScoreConfig, validated
from safeshape.defences import resolve_defence
from safeshape.models import load
from safeshape.signals.column import fill, scored_rows
from safeshape.signals.engines import local
from safeshape.signals.judges import Judge, Judging
from safeshape.signals.probes import Probe
from safeshape.signals.scorers import open_scorer
from safeshape.sources import model_path, open_source
from safeshape.store import Store
from safeshape.world.judge import load_judge

FILES = (*POOLS, "requests", "benign_requests", "safe_data", "harmful_data", "base_model", "guard_model", "probe")
SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(POOLS),
    "rows": None,
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 2e-4,
    "lora_rank": 0,
    "guard": None,
    "guard_model": None,
    "chunk": 5,
    "probe": None,
    "critic": None,
    "base_model": None,
    "safe_data": None,
    "harmful_data": None,
    "requests": None,
    "benign_requests": None,
    "prompts": 150,
    "judge": None,
    "max_new_tokens": 256,
    "asked": {"direct": "direct"},
}


def settings_of(cell: Cell) -> dict[str, Any]:
    """The cell's settings over the defaults.

    `benign`, `harmful`, `safe`, `identity`: files of the pools that the attack draws from. `rows`: of the training, as
    many as the pools allow where it is not given; `epochs`, `batch_size`, `learning_rate`, `lora_rank` (0: full
    fine-tuning). Scores, where the defence needs any: `guard` and `guard_model`, `probe` (a saved one) or `critic` (a
    judge), with `chunk` words. `base_model`, `safe_data`, `harmful_data`: what a defence may need. `requests`: file of
    held-out harmful requests; `benign_requests`: of harmless ones, for over-refusal. `prompts`: how many of each at
    most. `judge`: what `load_judge` takes: a name, or a mapping of it and its settings. `asked`: name to prompt attack.
    Errors: ValueError that names the setting.
    """
    for key in cell.settings:
        if key not in SETTINGS:
            raise ValueError(f"unknown setting {key!r}; a cell on your own model has: {', '.join(SETTINGS)}")
    given = {**SETTINGS, **cell.settings}
    for key in ("requests", "judge"):
        if given[key] is None:
            raise ValueError(f"a cell on your own model needs the setting {key!r}")
    for key in (*POOLS, "requests", "benign_requests", "safe_data", "harmful_data"):
        if given[key] is not None and not Path(given[key]).exists():
            raise ValueError(f"{key}: {given[key]}: no such file or folder")
    if sum(given[key] is not None for key in ("guard", "probe", "critic")) > 1:
        raise ValueError("give a guard, a probe or a critic: one of them")
    if cell.defence["name"] != UNTOUCHED:
        needs = resolve_defence(cell.defence).needs
        for key in ("base_model", "safe_data", "harmful_data"):
            if key in needs and given[key] is None:
                raise ValueError(f"defence {cell.defence['name']!r} needs the setting {key!r}")
        if "scores" in needs and not any(given[key] for key in ("guard", "probe", "critic")):
            raise ValueError(f"defence {cell.defence['name']!r} needs scores; give a guard, a probe or a critic")
    return given


def requests(path: str, most: int) -> list[Attacked]:
    """Held-out requests of a file, the first `most`. Errors: ValueError that names the file and row."""
    return prompts_of(list(open_source(path).rows()), path)[:most]


def train_cell(cell: Cell, folder: Path, store: Store) -> Trained:
    """The cell's model: attacked data, scored where the defence needs it, fine-tuned under the defence."""
    given = settings_of(cell)
    model, tokenizer = load(model_path(cell.model))
    if cell.defence["name"] == UNTOUCHED:
        return Trained(model=model, tokenizer=tokenizer, system_prompt=None, report={})
    defence = resolve_defence(cell.defence)
    rows, report = attacked(cell, given)
    if "scores" in defence.needs:
        rows = scored(rows, given, (model, tokenizer), store)
    lora = int(given["lora_rank"])
    data = {key: _dataset(given[key]) for key in ("safe_data", "harmful_data") if key in defence.needs}
    return defended(
        defence,
        model,
        tokenizer,
        fine_tuning(given, cell.seed, folder),
        report,
        train_dataset=rows,
        peft_config=LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear") if lora else None,
        base=load(model_path(given["base_model"]))[0] if "base_model" in defence.needs else None,
        **data,
    )


def attacked(cell: Cell, given: Mapping[str, Any]) -> tuple[Dataset, Mapping[str, Any]]:
    """The user's pools after the cell's attack, and the attack's own report."""
    pools = Pools(**{name: _conversations(given[name]) for name in POOLS if given[name] is not None})
    parameters = {key: value for key, value in cell.attack.items() if key != "name"}
    poisoned = data_attack(cell.attack["name"], parameters)(pools, size=given["rows"], seed=cell.seed)
    return Dataset.from_list(poisoned.dataset), poisoned.report


def scored(
    rows: Dataset,
    given: Mapping[str, Any],
    reference: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    store: Store,
) -> Dataset:
    """The rows with a `safety` column by the guard, probe or judge that the settings name."""
    judge: Judging | None = None
    if given["guard"] is not None:
        names = {"guard": [given["guard"]], "guard_model": [given["guard_model"]] if given["guard_model"] else []}
        config = validated(ScoreConfig, {"dataset_name": "-", "output": "-", "chunk": given["chunk"], **names})
        source = world.path("guard") if given["guard"] == "world" and not given["guard_model"] else given["guard_model"]
        opened = open_scorer(config, [source])
        signal, score, maker, scorer = "guard", opened.score, opened.maker, opened.scorer
    elif given["probe"] is not None:
        probe = Probe.from_pretrained(given["probe"], model=reference[0], tokenizer=reference[1])
        signal, score, scorer = "probe", probe.score_many, probe.identity()
        maker = {"scorer": scorer, "weights": probe.fingerprint()}
    else:
        judge = load_judge(given["critic"])
        signal, score, scorer = "judge", judge.score_many, judge.identity()
        maker = judge.maker() if isinstance(judge, Judge) else scorer
    outcome = fill(lambda: iter(rows), local(score), store, maker=maker, keep_failures=False)
    if judge is not None:
        judge.close()
    found = scored_rows(lambda: iter(rows), store, maker=maker, scorer=scorer, outcome=outcome, signal=signal)
    return rows.add_column("safety", [{**row["safety"], "scorer": {"signal": signal}} for row in found])


def _conversations(path: str) -> list[Any]:
    return list(conversations_of(list(open_source(path).rows()), path))


def _dataset(path: str) -> Dataset:
    return Dataset.from_list([{"messages": list(messages)} for messages in _conversations(path)])
