"""`safeshape bench`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import parse, read_yaml
from safeshape.config.bench import BenchConfig

if TYPE_CHECKING:
    from safeshape.bench import Matrix


def main(argv: Sequence[str]) -> str:
    """Run the matrix and collect its rows. Errors: ValueError for bad input; RuntimeError when cells failed."""
    config = parse(BenchConfig, "bench", argv)
    from safeshape.bench import read_matrix, run_cells
    from safeshape.bench.cell import PROMPTS, axes, check_cell, run_cell
    from safeshape.bench.runner import rows_of
    from safeshape.verbs.bars import bars

    matrix = read_matrix(config.experiments, config.settings, config.scales, config.scale)
    for cell in matrix.cells:
        check_cell(cell)
    notes = _notes(config, matrix)
    wanted = {key for name in config.only or config.experiments for key in matrix.experiments[name]}
    folder = Path(config.output_dir)
    with bars() as progress:
        found = run_cells(
            [cell for cell in matrix.cells if cell.key() in wanted],
            run_cell,
            folder / "cells",
            jobs=config.jobs,
            engine=config.engine,
            timeout_s=config.timeout,
            progress=lambda done, total: progress("cells", done, total),
        )
    # Cells that an earlier call with other --only has run stand in the results too.
    by_key = {c.key(): rows for c in matrix.cells if (rows := rows_of(folder / "cells" / c.name())) is not None}
    done = [cell for cell in matrix.cells if cell.key() in by_key]
    rows = [{**row, "settings": axes(cell)} for cell in done for row in by_key[cell.key()]]
    outcomes = [
        {**one, "settings": axes(cell)}
        for cell in done
        for one in json.loads((folder / "cells" / cell.name() / PROMPTS).read_text())
    ]
    failures = [{"cell": failed.cell.name(), "reason": failed.reason} for failed in found.failures]
    for name, content in (("results", rows), ("outcomes", outcomes), ("failures", failures)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    page = folder / f"{config.page}.md"
    if config.page:
        page.write_text(_page(config, matrix, by_key, notes, folder / "cells"))
    told = f"{len(found.rows)} of {len(wanted)} cells have rows ({found.reused} had them before)"
    if failures:
        listed = "; ".join(f"{failed['cell']}: {failed['reason']}" for failed in failures[:5])
        raise RuntimeError(f"{told}; {len(failures)} failed: {listed}; see {folder / 'failures.json'}")
    return f"{told}. Wrote {folder / 'results.json'}{f' and {page}' if config.page else ''}"


def _notes(config: BenchConfig, matrix: "Matrix") -> Mapping[str, str]:
    """Our reading by experiment. Errors: ValueError for a matrix that the page does not fit, or bad notes."""
    from safeshape.bench.defences_page import check_defences
    from safeshape.bench.reproduction_page import check_matrix, papers

    if config.page == "reproduction":
        check_matrix(matrix, papers())
    elif config.page == "defences":
        check_defences(matrix)
    notes: dict[str, Any] = {} if config.notes is None else read_yaml(config.notes)
    for name, text in notes.items():
        if name not in matrix.experiments or not isinstance(text, str):
            raise ValueError(f"{config.notes}: {name!r} must be an experiment of the matrix with a text")
    return notes


def _page(
    config: BenchConfig,
    matrix: "Matrix",
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    notes: Mapping[str, str],
    folder: Path,
) -> str:
    from safeshape.bench.cell import NOTES
    from safeshape.bench.defences_page import defences_page
    from safeshape.bench.facts import run_facts
    from safeshape.bench.reproduction_page import papers, reproduction_page
    from safeshape.defences.cost import COSTS, read_costs

    done = [cell for cell in matrix.cells if cell.key() in rows]
    seconds = [json.loads((folder / cell.name() / NOTES).read_text()) for cell in done]
    facts = run_facts(config.scale, matrix, done, seconds=[s["train_s"] + s["evaluate_s"] for s in seconds])
    if config.page == "reproduction":
        return reproduction_page(matrix, rows, facts=facts, notes=notes, content=papers())
    measured = read_costs(COSTS)
    facts["Costs"] = f"from `safeshape defences measure`, {measured['date']}, {measured['device']}"
    return defences_page(matrix, rows, facts=facts, notes=notes, costs=measured["costs"])
