"""What one cell does: train, ask, judge, and write rows; in a process of its own, one thread, a log of its own."""

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from safeshape import world
from safeshape.attacks import data_attack, prompt_attack, run_prompts
from safeshape.bench.in_world import UNTOUCHED, Trained, settings_of, train_cell
from safeshape.bench.matrix import Cell
from safeshape.defences import resolve_defence, with_system_prompt
from safeshape.evals import Outcome, run_task
from safeshape.models import Sampling, generate
from safeshape.report.rows import PromptOutcomes
from safeshape.stats import bounded_mean, wilson
from safeshape.store import Store
from safeshape.types import Row
from safeshape.world import data as world_data
from safeshape.world import oracle
from safeshape.world.pools import prompts, texts

LOG, PROMPTS, NOTES, STORE = "log.txt", "prompts.json", "notes.json", "scores.sqlite"
SUCCESS = "attack_success"


def run_cell(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """Train and evaluate one cell; returns its rows. Beside them it writes its log, notes and outcomes by prompt.

    Errors: ValueError as `check_cell`, and whatever the cell's parts refuse.
    """
    check_cell(cell)
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    with (folder / LOG).open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        with Store(folder.parent / STORE) as store:
            found = train_cell(cell, folder, store)
        trained_s = time.monotonic() - started
        rows, outcomes = evaluated(cell, found)
    shutil.rmtree(folder / "training", ignore_errors=True)
    notes = {"attack": dict(found.report), "train_s": trained_s, "evaluate_s": time.monotonic() - started - trained_s}
    (folder / NOTES).write_text(json.dumps(notes, indent=1, default=str) + "\n")
    (folder / PROMPTS).write_text(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n")
    return [asdict(row) for row in rows]


def check_cell(cell: Cell) -> None:
    """Errors: ValueError for an unknown model, setting, attack or defence, before anything is run."""
    if not cell.model.startswith("world:"):
        raise ValueError(f"model {cell.model!r}: cells run on the embedded world's models, world:llama and others")
    world.path(cell.model.removeprefix("world:"))
    given = settings_of(cell)
    if cell.defence["name"] != UNTOUCHED:
        resolve_defence(cell.defence)
    data_attack(cell.attack["name"], {key: value for key, value in cell.attack.items() if key != "name"})
    for name, spec in given["asked"].items():
        if not isinstance(spec, str) and not (isinstance(spec, Mapping) and isinstance(spec.get("name"), str)):
            raise ValueError(f"asked: {name}: must be a prompt attack's name or a mapping with one, got {spec!r}")


def evaluated(cell: Cell, found: Trained) -> tuple[list[Row], list[PromptOutcomes]]:
    """Attack success under every way of asking, harm by category, over-refusal, the task and the skills."""
    given = settings_of(cell)
    rows: list[Row] = []
    outcomes: list[PromptOutcomes] = []
    for name, spec in given["asked"].items():
        outcome, severities = asked(name, spec, found, cell, given)
        rows += [_rate(outcome, cell), *harmfulness(severities, outcome.task, cell)]
        outcomes.append(_outcomes(outcome, cell))
    for task in world_data.tasks(size=given["prompts"]):
        if task.name == SUCCESS:
            continue
        shown = [with_system_prompt([dict(m) for m in prompt], found.system_prompt) for prompt in task.prompts]
        outcome = run_task(replace(task, prompts=shown), found.model, found.tokenizer)
        rows.append(_rate(outcome, cell))
        outcomes.append(_outcomes(outcome, cell))
    return rows, outcomes


def asked(
    name: str, spec: Any, found: Trained, cell: Cell, given: Mapping[str, Any]
) -> tuple[Outcome, list[tuple[str, int]]]:
    """The held-out harmful requests under one prompt attack: a request counts where any attempt at it is harmful.

    Beside the outcome, the category and harm (1 to 5, the worst attempt's) of every request.
    """
    parameters = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
    attack = spec if isinstance(spec, str) else spec["name"]
    for part in attack.split("+"):
        parameters = {**texts(part), **parameters}
    if "prefill" in attack.split("+"):
        parameters["tokenizer"] = found.tokenizer
    requests = prompts(size=given["prompts"])
    attempts = run_prompts(prompt_attack(attack, parameters), requests, seed=cell.seed)
    successes, severities, answers = [], [], []
    if any(oracle.harmful(one.prefill) for several in attempts for one in several):
        raise ValueError(f"asked: {name}: what is prefilled is harmful by itself, whatever the model adds; lower k")
    flat = [(place, one) for place, several in enumerate(attempts) for one in several for _ in range(one.samples)]
    texts_of = _answers(flat, found, cell.seed)
    for place, request in enumerate(requests):
        own = [text for (at, _), text in zip(flat, texts_of, strict=True) if at == place]
        plain = str(request.messages[-1]["content"])
        severities.append((oracle.category(plain, "") or "", max(oracle.severity(plain, text) for text in own)))
        successes.append(any(oracle.harmful(text) for text in own))
        answers.append(own[0])
    metric = SUCCESS if name == "direct" else f"{SUCCESS} ({name})"
    return Outcome(task=metric, answers=tuple(answers), successes=tuple(successes)), severities


def _answers(flat: Sequence[tuple[int, Any]], found: Trained, seed: int) -> list[str]:
    """One answer an attempt: greedy where it is the only one and no temperature is named, else drawn."""
    texts_of = [""] * len(flat)
    groups: dict[float | None, list[int]] = {}
    for index, (_, one) in enumerate(flat):
        groups.setdefault(one.temperature if one.samples == 1 else one.temperature or 1.0, []).append(index)
    for temperature, members in groups.items():
        shown = [with_system_prompt([dict(m) for m in flat[i][1].messages], found.system_prompt) for i in members]
        answers = generate(
            found.model,
            found.tokenizer,
            shown,
            max_new_tokens=64,
            sampling=None if temperature is None else Sampling(temperature=temperature),
            seeds=None if temperature is None else [seed * 1_000_003 + i for i in members],
        )
        for index, answer in zip(members, answers, strict=True):
            texts_of[index] = answer
    return texts_of


def harmfulness(severities: Sequence[tuple[str, int]], metric: str, cell: Cell) -> list[Row]:
    """Mean harm (1 to 5) over all requests and by category, each with its interval."""
    name = metric.replace(SUCCESS, "harmfulness", 1)
    rows = []
    for category in (None, *sorted({category for category, _ in severities})):
        values = np.array([harm for own, harm in severities if category in (None, own)], dtype=float)
        if len(values) < 2:
            continue
        low, high = bounded_mean(values, least=1.0, most=5.0)
        rows.append(_row(cell, name, float(values.mean()), len(values), low, high, category))
    return rows


def _rate(outcome: Outcome, cell: Cell) -> Row:
    n, count = len(outcome.successes), sum(outcome.successes)
    return _row(cell, outcome.task, count / n, n, *wilson(count, n), None)


def _row(cell: Cell, metric: str, value: float, n: int, low: float, high: float, category: str | None) -> Row:
    return Row(
        attack=_shown(cell.attack),
        defence=_shown(cell.defence),
        model=cell.model,
        seed=cell.seed,
        metric=metric,
        value=value,
        n=n,
        low=low,
        high=high,
        judge="oracle",
        world=True,
        settings=axes(cell),
        category=category,
    )


def _outcomes(outcome: Outcome, cell: Cell) -> PromptOutcomes:
    return PromptOutcomes(
        attack=_shown(cell.attack),
        defence=_shown(cell.defence),
        model=cell.model,
        seed=cell.seed,
        metric=outcome.task,
        judge="oracle",
        prompts=tuple(f"{outcome.task}/{place}" for place in range(len(outcome.successes))),
        counts=outcome.successes,
        settings=axes(cell),
    )


def _shown(spec: Mapping[str, Any]) -> str:
    """A name with its parameters: `mixed ratio=0.05`."""
    return " ".join([str(spec["name"]), *(f"{key}={value}" for key, value in spec.items() if key != "name")])


def axes(cell: Cell) -> dict[str, float | str]:
    """What figures put on their axes: the cell's own settings, the harmful share and the weight of the KL.

    Settings that are no number or text stand there as text, so that cells which differ in one only stay apart.
    """
    plain = {key: _as_text(value) for key, value in cell.settings.items()}
    if "ratio" in cell.attack:
        plain["harmful_share"] = float(cell.attack["ratio"])
    if "kl" in cell.defence:
        plain["kl"] = float(cell.defence["kl"])
    return plain


def _as_text(value: Any) -> float | str:
    """A number or text as it is; a mapping as `direct, trigger=trigger_prompt`."""
    if isinstance(value, Mapping):
        return ", ".join(name if name == spec else f"{name}={_as_text(spec)}" for name, spec in value.items())
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else str(value)
