"""`safeshape probe eval`."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeshape.config import ProbeEvalConfig, parse
from safeshape.config.probe_fit import layers_of

if TYPE_CHECKING:
    from safeshape.signals.probes.choosing import Bank, Fitted
    from safeshape.signals.probes.protocol import Labelled, Unit
    from safeshape.signals.probes.reading import Reader
    from safeshape.store import Store

ATTRIBUTED = 60  # test prompts of each label in the attribution figure
RESULTS = "probe-eval.json"


def main(argv: Sequence[str]) -> str:
    """Measure probes and write results, a table and figures. Errors: ValueError in one sentence."""
    config = parse(ProbeEvalConfig, "probe eval", argv)
    folder = Path(config.output_dir)
    if folder.is_file() or (folder / RESULTS).exists():
        raise ValueError(f"output_dir {folder} already holds results")
    from safeshape.report.probe_figures import write_figures
    from safeshape.report.probe_tables import docs_section, text_report
    from safeshape.store import Store
    from safeshape.verbs.bars import bars
    from safeshape.verbs.probe_data import described, labelled

    started = time.monotonic()
    data = labelled(config.datasets, Path(config.data_folder), most=config.max_per_dataset, seed=config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with Store(config.store or folder / "store.sqlite") as store, bars() as progress:
        models = [measure(name, config, data, store, progress) for name in config.model]
    results = {
        "data": described(data),
        "models": models,
        "world": any(entry.path.startswith("world:") for entry in config.datasets),
        "settings": {
            "max_per_dataset": config.max_per_dataset,
            "threshold": config.threshold,
            "pooling": config.pooling,
            "layers": config.layers,
            "seed": config.seed,
            "dtype": config.dtype,
        },
        "made_by": {**versions(config.device), "seconds": round(time.monotonic() - started)},
    }
    text = text_report(results)
    (folder / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / "probe-eval.txt").write_text(text + "\n")
    (folder / "probe-eval.md").write_text(docs_section(results, config.title))
    written = ", ".join(path.name for path in write_figures(results, folder))
    return "\n".join([text, "", f"Wrote {folder / RESULTS}, probe-eval.txt, probe-eval.md and {written}"])


def _places(config: ProbeEvalConfig, reader: Any) -> tuple[int, ...]:
    """The hidden states that are read."""
    wanted = layers_of(config.layers)
    return tuple(range(reader.depth)) if wanted == "all" else tuple(reader.place(int(one)) for one in wanted)


def _folds(data: "Labelled", groups: Sequence[str], seed: int) -> list[Any]:
    """Folds of the rows that may be trained on, whole groups apart."""
    from safeshape.signals.probes.folds import Fold, group_folds

    train = np.flatnonzero(data.trains)
    found = group_folds(data.labels[train], [groups[int(row)] for row in train], seed=seed)
    return [Fold(fit=train[fold.fit], held_out=train[fold.held_out]) for fold in found]


def measure(
    name: str, config: ProbeEvalConfig, data: "Labelled", store: "Store", progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Everything that is known about the probes of one model."""
    from safeshape.signals.probes.choosing import Bank
    from safeshape.signals.probes.evaluation import evaluate, shuffled_control, summary
    from safeshape.signals.probes.features import extract
    from safeshape.signals.probes.fitting import C_GRID
    from safeshape.signals.probes.folds import Fold
    from safeshape.signals.probes.methods import BagOfWords, ProbeMethod
    from safeshape.signals.probes.protocol import units
    from safeshape.signals.probes.reading import POOLINGS, load_model, open_reader, verify
    from safeshape.signals.probes.sweep import sweep
    from safeshape.signals.probes.template import template_check
    from safeshape.sources import model_path
    from safeshape.verbs.probe_data import groups_of

    reader = open_reader(*load_model(model_path(name), dtype=config.dtype, device=config.device))
    verify(reader)
    places, shown = _places(config, reader), display(name)
    poolings = POOLINGS if config.pooling == "auto" else (config.pooling,)

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(f"{shown}: {what}", done, total)

    def stage(label: str, done: int, total: int) -> None:
        progress(f"{shown}: {label}", done, total)

    how: dict[str, Any] = {"layers": places, "poolings": poolings, "batch_size": config.batch_size}
    states = extract(data.prompts, reader, store=store, **how, progress=told("prompts read"))
    bank, groups = Bank(states_BPDH=states, poolings=poolings, places=places), groups_of(data)
    probe = ProbeMethod(bank=bank, labels=data.labels, groups=groups, grid=C_GRID, seed=config.seed)
    bag = BagOfWords(texts=data.texts, labels=data.labels, groups=groups, seed=config.seed)
    rows = evaluate(data, probe, bag, threshold=config.threshold, seed=config.seed, progress=stage)
    first = next(units(data, seed=config.seed))
    fitted = probe.fit(first.fit)
    rows_read: dict[str, Any] = {"fit_rows": first.fit.tolist(), "test_rows": first.asked.tolist()}
    read = {**rows_read, "store": store, "seed": config.seed, "progress": told("read under a system prompt")}
    check = template_check(data.prompts, data.labels, fitted, reader, **read)
    folds = _folds(data, groups, config.seed)
    split = Fold(fit=first.fit, held_out=first.asked)
    return {
        "model": shown,
        "hidden_states": reader.depth,
        "hidden_size": reader.hidden,
        "read_as": "chat template" if reader.chat else "plain text",
        "units": rows,
        "summary": summary(rows),
        "shuffled_labels": shuffled_control(data, probe, seed=config.seed),
        "template": check,
        "sweep": sweep(bank, data.labels, split, folds, seed=config.seed),
        "attribution": attributed(data, bank, reader, first, fitted, config.seed),
    }


def display(name: str) -> str:
    """A model's name without the folders of one machine; a folder called `model` goes by the one around it."""
    path = Path(name)
    if not path.is_dir():
        return name
    return path.parent.name if path.name == "model" else path.name


def attributed(
    data: "Labelled", bank: "Bank", reader: "Reader", unit: "Unit", fitted: "Fitted", seed: int
) -> dict[str, Any] | None:
    """What layers and parts of the prompt add to the log odds, harmful minus harmless; None without mean pooling.

    Of a probe on the mean over tokens with all layers side by side, where the sum over layers and tokens is exact.
    """
    from safeshape.signals.probes.choosing import Choice
    from safeshape.signals.probes.fitting import fit_linear
    from safeshape.signals.probes.sweep import SWEEP_C, attribution, by_parts

    if "mean" not in bank.poolings:
        return None
    x = bank.take(Choice(pooling="mean", layers=bank.places), unit.fit)
    linear = fit_linear(x, data.labels[unit.fit], C=SWEEP_C, layer_pooling="concat", layers=len(bank.places), seed=seed)
    mean_DH = x.mean(0, dtype=np.float64).reshape(len(bank.places), -1)
    rng, found = np.random.default_rng(seed), {}
    for kind, label in (("harmful", True), ("harmless", False)):
        rows = rng.permutation(unit.asked[data.labels[unit.asked] == label])[:ATTRIBUTED]
        prompts = [data.prompts[row] for row in rows.tolist()]
        found[kind] = by_parts(attribution(prompts, reader, linear, mean_DH, layers=bank.places)).tolist()
    return {"layers": list(bank.places), "prompts_of_each": ATTRIBUTED, "chosen_C": fitted.C, **found}


def versions(device: str) -> dict[str, Any]:
    """What the figures were made with."""
    import sklearn
    import torch
    import transformers

    import safeshape

    on = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    return {
        "safeshape": safeshape.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "device": on,
    }
