"""Everything that `safeshape report` writes, from rows in folders."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from safeshape.config import ReportConfig
from safeshape.provenance import versions
from safeshape.report.card import JUDGE_METRICS, README, make_card, with_section, write_card
from safeshape.report.curves import curve_figure, panel_figures, scatter_figures, varying
from safeshape.report.drawing import save
from safeshape.report.grid import Grid, make_grid, part_of
from safeshape.report.page import Side, write_page
from safeshape.report.places import UNATTACKED, before, named, place_of, told_apart
from safeshape.report.radar import radar_figure
from safeshape.report.rows import OUTCOMES, PromptOutcomes, find, key_of, read_outcomes, read_results
from safeshape.report.tables import WORLD_NOTE
from safeshape.report.texts import as_json, csv_text, latex, markdown
from safeshape.types import Row

PANELS = ("model", "guard", "dataset")
Drawn = Figure | list[Figure] | dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What was written, which figures could not be drawn and why, and the grid behind it."""

    written: tuple[Path, ...]
    skipped: tuple[str, ...]
    grid: Grid


def read(places: Sequence[str]) -> tuple[list[Row], list[PromptOutcomes], list[Path]]:
    """All rows and outcomes in files and folders, and the files of rows. Errors: ValueError that names the file."""
    files = find(places)
    rows = [row for path in files for row in read_results(path)]
    if not rows:
        raise ValueError(f"there are no rows in {', '.join(map(str, files))}")
    return rows, [item for path in find(places, OUTCOMES) for item in read_outcomes(path)], files


def figures_of(rows: Sequence[Row], grid: Grid, config: ReportConfig) -> tuple[dict[str, Figure], list[str]]:
    """Every figure that the rows allow, by what it shows; and a sentence for each that was passed over."""
    text = WORLD_NOTE if grid.world else ""
    safety = [metric for metric in config.safety if metric in grid.metrics]
    utility = [metric for metric in config.utility if metric in grid.metrics]
    shown = list(dict.fromkeys([*safety, *utility]))
    drawings: dict[str, Callable[[], Drawn]] = {}
    for metric, about, chosen in _radars(rows):
        drawings[f"{metric} by category{f', {about}' if about else ''}"] = partial(radar_figure, chosen, metric, text)
    for setting in varying(grid):
        for metric in safety:
            drawings[f"{metric} against {setting}"] = partial(curve_figure, grid, metric, setting, text=text)
    for metric in safety:
        for other in utility:
            drawings[f"{metric} against {other}"] = partial(scatter_figures, grid, metric, other, text)
    for by in PANELS:
        if shown and len({part_of(key, by) for key in grid.keys} - {""}) > 1:
            drawings[f"{' and '.join(shown)} by {by}"] = partial(panel_figures, grid, shown, by, text)
    found: dict[str, Figure] = {}
    skipped: list[str] = []
    for name, draw in drawings.items():
        try:
            found |= _each(name, draw())
        except ValueError as error:  # rows may allow a table without allowing every figure
            skipped.append(f"Not drawn: {name}, because {error}")
    return found, skipped


def _each(name: str, drawn: Drawn) -> dict[str, Figure]:
    """Figures by what each of them shows."""
    if isinstance(drawn, Figure):
        return {name: drawn}
    if isinstance(drawn, dict):
        return {f"{name}, {about}" if len(drawn) > 1 else name: figure for about, figure in drawn.items()}
    pages = [f"{name}, {place} of {len(drawn)}" if len(drawn) > 1 else name for place in range(1, len(drawn) + 1)]
    return dict(zip(pages, drawn, strict=True))


def _radars(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Metrics with three categories or more: once for each attack, model, judge and settings.

    Rows without an attack (attack `none`) of the same model and judge are the state before, and stand beside each.
    """
    found = []
    rows = [row for row in rows if row.category is not None]
    for metric in dict.fromkeys(row.metric for row in rows):
        chosen = [row for row in rows if row.metric == metric]
        if len({row.category for row in chosen}) < 3:
            continue
        places = list(dict.fromkeys(place_of(key_of(row)) for row in chosen))
        attacked = [place for place in places if place.attack != UNATTACKED] or places
        for place, about in zip(attacked, told_apart(attacked), strict=True):
            mine = [row for row in chosen if place_of(key_of(row)) == place]
            others = [row for row in chosen if place.attack != UNATTACKED and before(key_of(row), place)]
            mine = [replace(row, defence=named(key_of(row))) for row in mine]
            defended = {row.defence for row in mine}
            found.append(
                (
                    metric,
                    about if len(attacked) > 1 else "",
                    [*(row for row in others if row.defence not in defended), *mine],
                )
            )
    return found


def build(config: ReportConfig, sides: Sequence[Side]) -> Built:
    """Read, refuse what cannot be, draw, then write. Errors: ValueError in one sentence, before anything is written."""
    rows, outcomes, files = read(config.results)
    measured = [row for row in rows if not row.metric.startswith(JUDGE_METRICS)]
    grid = make_grid(measured, outcomes=outcomes, baseline=config.baseline, metrics=config.metrics)
    figures, skipped = figures_of(measured, grid, config)
    card = None
    if config.card_into is not None:
        folder, readme = Path(config.card_into), Path(config.card_into) / README
        card = make_card(rows, folder, defence=config.card_defence or "", sources=files)
        if readme.is_file():
            with_section(readme.read_text(encoding="utf-8"), "")  # refuses damaged markers
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / name for name in ("report.html", "table.md", "table.tex", "table.csv", "report.json")]
    facts = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    facts |= {"versions": ", ".join(f"{name} {value}" for name, value in versions().items())}
    for figure, stem in zip(figures.values(), _stems(list(figures)), strict=True):
        written += save(figure, output / "figures" / stem)
    write_page(written[0], title=config.title, grid=grid, figures=figures, facts=facts, sides=sides, limit=config.limit)
    written[1].write_text(markdown(grid), encoding="utf-8")
    written[2].write_text(latex(grid), encoding="utf-8")
    written[3].write_text(csv_text(grid), encoding="utf-8")
    content = {"world": grid.world, "baseline": grid.baseline, "cells": as_json(grid), "made_from": facts}
    written[4].write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if card is not None and config.card_into is not None:
        written += write_card(Path(config.card_into), card)
    return Built(written=tuple(written), skipped=tuple(skipped), grid=grid)


def _stems(names: Sequence[str]) -> list[str]:
    """File names of figures: letters and digits of what they show, different from one another."""
    found: list[str] = []
    for name in names:
        words = "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in name.lower()).split()
        stem = "_".join(words)[:120] or "figure"
        found.append(stem if stem not in found else f"{stem}_{len(found)}")
    return found
