"""`safeshape defences`."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safeshape.config import DefencesConfig, parse

_NOTE = (
    "cost: time of an update over that of plain fine-tuning, in the run that the defence changes (for the stage "
    "alignment the alignment run);\n+ once: its work outside of that run, in updates of plain fine-tuning.\n"
    "How far sft is from 1 is the noise; so are one or two updates. "
)


def main(argv: Sequence[str]) -> str:
    """List or measure. Errors: ValueError in one sentence."""
    config = parse(DefencesConfig, "defences", argv)
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ValueError(f"the folder of output {config.output} does not exist")
    return _measured(config) if config.action == "measure" else _listed(config)


def _listed(config: DefencesConfig) -> str:
    from safeshape.defences.cost import COSTS, read_costs, rows, text

    found = read_costs(COSTS if config.costs is None else Path(config.costs))
    table = rows(found["costs"])
    where = f"Measured on the embedded world, {found['date']}, {found['device']}, {found['steps']} updates a run."
    if config.output is not None:
        facts = {name: value for name, value in found.items() if name != "costs"}
        Path(config.output).write_text(json.dumps({**facts, "defences": table}, indent=1) + "\n")
    return f"{text(table)}\n\n{_NOTE}{where}"


def _measured(config: DefencesConfig) -> str:
    from safeshape.defences import DEFENCES
    from safeshape.defences.cost import measure, record
    from safeshape.verbs.bars import bars
    from safeshape.world.costs import bench

    unknown = sorted(set(config.only or ()) - set(DEFENCES))
    if unknown:
        raise ValueError(f"only: unknown defence {unknown[0]!r}; known: {', '.join(DEFENCES)}")
    names = [name for name in DEFENCES if config.only is None or name in config.only]
    with bars() as progress:
        timed = bench(config.family, steps=config.steps, batch_size=config.batch_size, seed=config.seed)
        shown = partial(progress, "defences timed")
        costs = measure(timed, names, repeats=config.repeats, progress=shown)
    facts: dict[str, Any] = {
        "family": config.family,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "repeats": config.repeats,
    }
    path = Path(config.output or "")
    path.write_text(json.dumps(record(costs, **facts, seed=config.seed), indent=1) + "\n")
    return f"Wrote the costs of {len(costs)} defences, measured on the embedded world, to {path}"
