"""`safeshape report`."""

from collections.abc import Sequence
from pathlib import Path

from safeshape.config import ReportConfig, parse


def main(argv: Sequence[str]) -> str:
    """Write the report and return its table. Errors: ValueError in one sentence, before anything is written."""
    config = parse(ReportConfig, "report", argv)
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_dir {output} is not an empty folder")
    if config.card_into is not None and not Path(config.card_into).is_dir():
        raise ValueError(f"card_into {config.card_into}: no such folder")
    from safeshape.report.build import build
    from safeshape.report.page import side_by_side
    from safeshape.report.texts import text_table
    from safeshape.verbs.scored_rows import scored_rows

    files = dict(entry.split("=", 1) for entry in config.answers)
    sides = side_by_side({name: scored_rows(path) for name, path in files.items()}) if files else []
    built = build(config, sides)
    figures = [path for path in built.written if path.parent.name == "figures" and path.suffix == ".png"]
    named = [str(path) for path in built.written if path.parent.name != "figures"]
    drawn = f"; {len(figures)} figures, each as .png and .svg, in {output / 'figures'}" if figures else ""
    return "\n".join([text_table(built.grid), *built.skipped, f"Wrote {', '.join(named)}{drawn}"])
