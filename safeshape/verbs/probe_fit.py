"""`safeshape probe fit`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from safeshape.config import ProbeFitConfig, PromptSet, parse
from safeshape.config.probe_fit import layers_of


def main(argv: Sequence[str]) -> str:
    """Fit a probe and write it with its card. Errors: ValueError in one sentence."""
    config = parse(ProbeFitConfig, "probe fit", argv)
    folder = Path(config.output_dir)
    if folder.is_file() or (folder / "probe.json").exists():
        raise ValueError(f"output_dir {folder} exists already")
    from safeshape.signals.probes import Probe, load_model
    from safeshape.signals.probes.reading import weights_sha256
    from safeshape.sources import model_path
    from safeshape.store import Store
    from safeshape.verbs.bars import bars

    prompts, labels, groups, texts = _data(config)
    layers: Any = layers_of(config.layers)
    name = model_path(config.model)
    model, tokenizer = load_model(name, revision=config.revision, dtype=config.dtype, device=config.device)
    with Store(config.store or ":memory:") as store, bars() as progress:
        probe = Probe.fit(
            prompts,
            labels,
            model=model,
            tokenizer=tokenizer,
            layers=layers,
            pooling=config.pooling,
            layer_pooling=config.layer_pooling,
            groups=groups,
            C=config.C,
            calibrate=config.calibrate,
            seed=config.seed,
            batch_size=config.batch_size,
            store=store if config.store else None,
            progress=lambda done, total: progress("prompts read", done, total),
        )
    control = _control(texts, labels, groups, config.seed)
    card = {**probe.card, "model_sha256": weights_sha256(model), "world": config.model.startswith("world:")}
    probe = replace(probe, card={**card, "bag_of_words": control})
    probe.save_pretrained(folder)
    return _summary(probe, control, folder, grouped=groups is not None)


def _data(config: ProbeFitConfig) -> tuple[list[Any], list[bool], list[str] | None, list[str]]:
    from safeshape.sources import open_source
    from safeshape.verbs.probe_data import from_rows, groups_of, labelled

    if config.dataset_name is not None:
        rows = open_source(config.dataset_name, config.dataset_split).rows
        options = {"label_column": config.label_column, "column": config.field}
        return from_rows(rows, group_column=config.group_column, **options)
    entries = config.datasets
    folder = Path(config.data_folder)
    if not entries:
        both = (("harmful", config.harmful), ("harmless", config.harmless))
        entries = [PromptSet(name=p, path=p, label=kind, field=config.field) for kind, paths in both for p in paths]  # type: ignore[arg-type]
        folder = Path()
    used = [entry for entry in entries if entry.role == "train"]
    data = labelled(used, folder, most=config.max_per_dataset, seed=config.seed)
    return list(data.prompts), data.labels.tolist(), groups_of(data), list(data.texts)


def _control(texts: Sequence[str], labels: Sequence[bool], groups: Sequence[str] | None, seed: int) -> dict[str, Any]:
    """The held-out AUROC of a bag of words in the same folds."""
    from safeshape.signals.probes.folds import group_folds
    from safeshape.signals.probes.methods import BagOfWords
    from safeshape.signals.reliability import auroc

    marks = np.array(labels)
    found = []
    for fold in group_folds(marks, groups, seed=seed):
        own = list(groups) if groups is not None else [f"row {row}" for row in range(len(texts))]
        bag = BagOfWords(texts=texts, labels=marks, groups=own, grid=(10.0,), seed=seed)
        verdict = bag.score(fold.fit, fold.held_out)
        found.append(auroc(-verdict, marks[fold.held_out]))
    return {"mean": float(np.mean(found)), "each": found}


def _summary(probe: Any, control: dict[str, Any], folder: Path, *, grouped: bool) -> str:
    from safeshape.report import WORLD_NOTE

    card = probe.card
    held = card["cross_validation"].get("held_out_auroc")
    shown = "not cross-validated" if held is None else f"AUROC {held['mean']:.3f}"
    where = "groups left out" if grouped else "random folds: no groups were given"
    lines = [
        f"fitted on {card['harmful']} harmful and {card['harmless']} harmless prompts",
        f"layers {' '.join(map(str, probe.layers))}, {probe.pooling} over tokens, {probe.layer_pooling} over layers, "
        f"C {card['C']:g}, calibration scale {card['calibration_scale']:.3g}",
        f"held out ({where}): probe {shown}, bag of words AUROC {control['mean']:.3f}",
        *([WORLD_NOTE] if card["world"] else []),
        f"Wrote {folder}",
    ]
    return "\n".join(lines)
