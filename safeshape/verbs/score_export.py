"""`safeshape score export`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import ScoreExportConfig, parse

if TYPE_CHECKING:
    from safeshape.signals.filtering import Filter


def main(argv: Sequence[str]) -> str:
    """Write the rows that are kept. Errors: ValueError in one sentence."""
    config = parse(ScoreExportConfig, "score export", argv)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output {output} exists already")
    from safeshape.signals.calibration import Calibration
    from safeshape.signals.filtering import Filter
    from safeshape.verbs.scored_rows import is_json_lines

    calibration = None if config.calibration is None else Calibration.from_file(config.calibration)
    by = config.by or ("min" if calibration is None else calibration.by)
    wanted = Filter(
        drop_below=config.drop_below,
        by=by,
        keep_prefix=config.keep_prefix,
        calibration=calibration,
        keep_failed=config.failed == "keep",
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    if is_json_lines(config.dataset_name) and output.suffix == ".jsonl":
        found = _lines(config.dataset_name, output, wanted)
    else:
        found = _dataset(config, output, wanted)
    return (
        f"Wrote {found['kept'] + found['cut'] + found['failed kept']} rows to {output}: {found['kept']} kept whole, "
        f"{found['cut']} cut, {found['dropped']} dropped; the scorer failed on {found['failed']}, which were "
        + ("kept" if wanted.keep_failed else "dropped")
    )


def _lines(name: str, output: Path, wanted: Filter) -> Counter[str]:
    """JSON lines to JSON lines, one by one; a line that is not cut is written as it was read."""
    from safeshape.data import json_lines

    found: Counter[str] = Counter()
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            for index, (line, row) in enumerate(json_lines(name)):
                kept = _apply(row, index, wanted, found)
                if kept is row:
                    file.write(line.rstrip("\r\n") + "\n")
                elif kept is not None:
                    file.write(json.dumps(kept) + "\n")
        _refuse_empty(found)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return found


def _dataset(config: ScoreExportConfig, output: Path, wanted: Filter) -> Counter[str]:
    """Any dataset to any form, with the column types it has."""
    from datasets import disable_progress_bars

    from safeshape.sources import read_dataset

    disable_progress_bars()
    dataset = read_dataset(config.dataset_name, config.dataset_split)
    found: Counter[str] = Counter()
    places: list[int] = []
    shorter: dict[int, dict[str, Any]] = {}  # by place among the rows that stay
    for index, row in enumerate(dataset):
        kept = _apply(row, index, wanted, found)
        if kept is not None:
            if kept is not row:
                shorter[len(places)] = kept
            places.append(index)
    _refuse_empty(found)
    dataset = dataset.select(places)
    if shorter:
        dataset = dataset.map(
            lambda row, place: shorter.get(place, row),
            with_indices=True,
            features=dataset.features,
            load_from_cache_file=False,
        )
    if output.suffix == ".jsonl":
        dataset.to_json(output)
    elif output.suffix == ".parquet":
        dataset.to_parquet(output)
    else:
        dataset.save_to_disk(output)
    return found


def _apply(row: dict[str, Any], index: int, wanted: Filter, found: Counter[str]) -> Any:
    from safeshape.signals.filtering import apply_filter

    try:
        outcome, kept = apply_filter(row, wanted)
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from error
    found[outcome] += 1
    if outcome == "failed" and kept is not None:
        found["failed kept"] += 1
    return kept


def _refuse_empty(found: Counter[str]) -> None:
    if not found["kept"] + found["cut"] + found["failed kept"]:
        raise ValueError(
            f"nothing would be left: {found['dropped']} rows dropped, the scorer failed on {found['failed']}"
        )
