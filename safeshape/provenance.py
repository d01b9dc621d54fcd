"""What a run was: the record written as `safeshape.json`, the hash of its data, and the check before resuming."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from safeshape.policies import Policy
from safeshape.signals.align import COLUMNS
from safeshape.types import IGNORE

RECORD = "safeshape.json"
_STARTING_MODEL = {"adapter_off", "copy", "cached"}  # the same reference, kept in different ways
_PACKAGES = ("safeshape", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def signals_of(dataset: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """Who scored the data: each different signal and scorer in the `safety` column, with its row count."""
    if isinstance(dataset, IterableDataset) or "safety" not in dataset.column_names:
        return []
    counts: dict[str, int] = {}
    for safety in dataset["safety"]:
        if safety is not None:
            named = {"signal": safety.get("signal"), "scorer": safety.get("scorer")}
            key = json.dumps(named, sort_keys=True, default=str)
            counts[key] = counts.get(key, 0) + 1
    return [{**json.loads(key), "rows": count} for key, count in counts.items()]


def data_summary(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Rows, response tokens and a SHA-256 over tokens, labels and scores, in order. A stream has no hash."""
    if isinstance(dataset, IterableDataset):
        return {"rows": None, "response_tokens": None, "sha256": None}
    digest, tokens = hashlib.sha256(), 0
    for batch in dataset.select_columns(list(COLUMNS)).with_format("numpy").iter(batch_size=1000):
        for name in COLUMNS:
            for row in batch[name]:
                values = np.ascontiguousarray(row, dtype=np.float32 if name.endswith("p_safe") else np.int64)
                digest.update(len(values).to_bytes(8, "little"))
                digest.update(values.tobytes())
                tokens += int((values[1:] != IGNORE).sum()) if name == "labels" else 0
    return {"rows": len(dataset), "response_tokens": tokens, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_record(
    *,
    policy: Policy,
    reference: str | None,
    signals: list[dict[str, Any]],
    data: Mapping[str, Any],
    model: nn.Module,
    state: Mapping[str, Any],
    on_policy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `safeshape.json`. It carries names, counts, hashes and versions, never the data's text."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "policy": {"name": policy.name, **policy.parameters, "divergence": policy.divergence},
        "reference": reference,
        "signals": signals,
        "on_policy": None if on_policy is None else dict(on_policy),
        "data": dict(data),
        "model": base.config._name_or_path if isinstance(base, PreTrainedModel) else type(base).__name__,
        "state": dict(state),
        "versions": versions(),
    }


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is passed over.

    The library writes `trainer_state.json` last, so a checkpoint without a readable one is not complete.
    """
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-[0-9]*")}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            json.loads((path / RECORD).read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


def checkpoint_of(resume: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint that `resume` means: a path as it is, True the newest complete one of the output folder.

    Errors: ValueError when there is none.
    """
    if isinstance(resume, str) or not resume:
        return resume or None
    found = last_complete_checkpoint(Path(output_dir or "."))
    if found is None:
        raise ValueError(f"no complete checkpoint to resume from in {output_dir}")
    return str(found)


def check_resume(checkpoint: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a checkpoint's record with the run that wants to resume it, and return the checkpoint's state.

    Errors: ValueError when the checkpoint has no record, or its policy, reference model or data differ.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        raise ValueError(f"{checkpoint} holds no {RECORD}; it was not written by SafeTrainer")
    then = json.loads(path.read_text())
    then.setdefault("on_policy", None)  # records of version 0.1 do not know it
    for name in ("policy", "reference", "on_policy"):
        same_start = name == "reference" and {then[name], now[name]} <= _STARTING_MODEL
        if then[name] != now[name] and not same_start:
            raise ValueError(f"cannot resume {checkpoint}: its {name} was {then[name]}, now it is {now[name]}")
    if then["data"]["sha256"] != now["data"]["sha256"]:
        raise ValueError(
            f"cannot resume {checkpoint}: the training data changed ({then['data']['rows']} rows then, "
            f"{now['data']['rows']} now, different hash)"
        )
    state: dict[str, Any] = then["state"]
    return state
