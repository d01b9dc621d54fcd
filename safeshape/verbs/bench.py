"""`safeshape bench`."""

import json
from collections.abc import Sequence
from pathlib import Path

from safeshape.config import parse
from safeshape.config.bench import BenchConfig


def main(argv: Sequence[str]) -> str:
    """Run the matrix and collect its rows. Errors: ValueError for bad input; RuntimeError when cells failed."""
    config = parse(BenchConfig, "bench", argv)
    from safeshape.bench import read_matrix, run_cells
    from safeshape.bench.cell import PROMPTS, run_cell
    from safeshape.verbs.bars import bars

    wanted = config.only or list(config.experiments)
    chosen = {name: config.experiments[name] for name in wanted}
    matrix = read_matrix(chosen, config.settings, config.scales, config.scale)
    folder = Path(config.output_dir)
    with bars() as progress:
        found = run_cells(
            matrix.cells,
            run_cell,
            folder / "cells",
            jobs=config.jobs,
            engine=config.engine,
            timeout_s=config.timeout,
            progress=lambda done, total: progress("cells", done, total),
        )
    done = [cell for cell in matrix.cells if cell.key() in found.rows]
    rows = [row for cell in done for row in found.rows[cell.key()]]
    outcomes = [one for cell in done for one in json.loads((folder / "cells" / cell.name() / PROMPTS).read_text())]
    failures = [{"cell": failed.cell.name(), "reason": failed.reason} for failed in found.failures]
    for name, content in (("results", rows), ("outcomes", outcomes), ("failures", failures)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    told = f"{len(done)} of {len(matrix.cells)} cells have rows ({found.reused} had them before)"
    if failures:
        listed = "; ".join(f"{failed['cell']}: {failed['reason']}" for failed in failures[:5])
        raise RuntimeError(f"{told}; {len(failures)} failed: {listed}; see {folder / 'failures.json'}")
    return f"{told}. Wrote {folder / 'results.json'}"
