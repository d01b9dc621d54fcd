"""`safeshape score`."""

from collections.abc import Sequence
from pathlib import Path

from safeshape.config import ScoreConfig, parse


def main(argv: Sequence[str]) -> str:
    """Score a dataset with a guard and write it. Errors: ValueError in one sentence."""
    config = parse(ScoreConfig, "score", argv)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output {output} exists already")
    from safeshape import world
    from safeshape.signals.column import score_dataset
    from safeshape.signals.guards import load_guard
    from safeshape.sources import read_dataset
    from safeshape.verbs.bars import bars

    dataset = read_dataset(config.dataset_name, config.dataset_split)
    default = world.path("guard") if config.guard == "world" else None
    guard = load_guard(config.guard, model=config.guard_model or default, device=config.device)
    with bars() as progress:
        scored = score_dataset(
            dataset,
            lambda rows: guard.score_many(rows, chunk=config.chunk, unit=config.unit, batch_size=config.batch_size),
            progress=lambda done, total: progress("scored", done, total),
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        scored.to_json(output)
    elif output.suffix == ".parquet":
        scored.to_parquet(output)
    else:
        scored.save_to_disk(output)
    unsafe = sum(row["p_safe"] < 0.5 for row in scored["safety"])
    return f"Wrote {len(scored)} scored rows to {output}; {unsafe} end below p_safe 0.5"
