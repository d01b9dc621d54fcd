"""What every verb that scores a dataset does with its scorer: score, write, and say what was done."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config.scoring import ScoringSettings

if TYPE_CHECKING:
    from safeshape.signals.calibration import Calibration
    from safeshape.signals.column import Engine


def check_output(config: ScoringSettings) -> None:
    """Errors: ValueError where the output exists already."""
    if Path(config.output).exists():
        raise ValueError(f"output {config.output} exists already")


def scored_dataset(
    config: ScoringSettings,
    source: Any,
    engine: "Engine",
    *,
    maker: Mapping[str, Any],
    scorer: dict[str, Any],
    signal: str = "star",
    calibration: "Calibration | None" = None,
) -> list[str]:
    """Write the source's rows with a `safety` column; returns what was done, in lines, the last about the store.

    `source`: from `open_source`. `maker`: everything that makes a score, for the store's keys. `scorer`: as it stands
    in the column.
    """
    from safeshape.signals.column import fill, safety_type, scored_rows
    from safeshape.sources import schema_of, with_column, write_rows
    from safeshape.store import Store
    from safeshape.verbs.bars import bars

    output = Path(config.output)
    store_path = config.store or f"{output}.store.sqlite"
    output.parent.mkdir(parents=True, exist_ok=True)
    with Store(store_path) as store, bars() as progress:
        outcome = fill(
            source.rows,
            engine,
            store,
            maker=maker,
            keep_failures=config.on_error == "keep",
            progress=lambda done: progress("scored", done, source.count),
        )
        rows = scored_rows(
            source.rows, store, maker=maker, scorer=scorer, outcome=outcome, signal=signal, calibration=calibration
        )
        written = scorer if calibration is None else {**scorer, "calibration": calibration.sha256}
        schema = None
        if output.suffix != ".jsonl":  # types of columns are known beforehand: those of the input, and `safety`
            own = source.schema if source.schema is not None else schema_of(source.rows())
            schema = with_column(own, "safety", safety_type(written))
        write_rows(output, rows, schema)
    lines = [
        f"scored {outcome.rows - outcome.failed} rows ({outcome.scored} now, {outcome.reused} from the store), "
        f"{outcome.unsafe} with p_safe below 0.5; wrote {output}"
    ]
    if outcome.failed:
        noun = "row" if outcome.failed == 1 else "rows"
        lines.append(f"{outcome.failed} {noun} failed (first: {outcome.first_failure})")
    return [*lines, f"The scores are kept in {store_path}."]
