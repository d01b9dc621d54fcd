"""A grid of results as text: Markdown, LaTeX, CSV, HTML and JSON. Names from data are escaped in each."""

import csv
import html
import io
from typing import Any

from safeshape.report.grid import FIELDS, Grid, part_of
from safeshape.report.rows import Key, Unit
from safeshape.report.tables import WORLD_NOTE


def number(value: float, unit: Unit) -> str:
    """A number as tables show it: percent with one digit, harmfulness with two, others with three significant ones."""
    return f"{100 * value:.1f}" if unit == "percent" else f"{value:.2f}" if unit == "harm" else f"{value:.3g}"


def shown(grid: Grid, key: Key, metric: str) -> str:
    """A cell as text: value, interval, n and marks; a dash where nothing was measured."""
    cell = grid.cells.get((key, metric))
    if cell is None:
        return "-"
    unit, test = grid.units[metric], grid.tests.get((key, metric))
    seeds = f", {len(cell.seeds)} seeds" if len(cell.seeds) > 1 else ""
    interval = f"{number(cell.low, unit)} to {number(cell.high, unit)}"
    return f"{number(cell.value, unit)}{'' if test is None else test.mark} ({interval}, n={cell.n}{seeds})"


def header(grid: Grid) -> list[str]:
    """The titles of the columns."""
    units = {"percent": ", %", "harm": ", 1-5", "number": ""}
    parts = [*grid.labels, *(f"{metric}{units[grid.units[metric]]}" for metric in grid.metrics)]
    return [part.replace("_", " ") for part in parts]


def lines(grid: Grid) -> list[list[str]]:
    """The cells as text, line by line; settings as short numbers."""
    found = []
    for key in grid.keys:
        parts = [part_of(key, label) for label in grid.labels]
        texts = [f"{part:g}" if isinstance(part, int | float) else part for part in parts]
        found.append([*texts, *(shown(grid, key, metric) for metric in grid.metrics)])
    return found


def notes(grid: Grid) -> list[str]:
    """What a reader must know about the table, as sentences."""
    several = sorted({cell.method for cell in grid.cells.values() if len(cell.seeds) > 1})
    found = [WORLD_NOTE] if grid.world else []
    found.append("Intervals are 95 %.")
    if several:
        found.append(f"Where there are several seeds: {'; '.join(several)}.")
    if grid.tests:
        counts: dict[str, int] = {}
        for test in grid.tests.values():
            counts[test.test] = counts.get(test.test, 0) + 1
        which = "; ".join(f"{name} ({n})" for name, n in sorted(counts.items()))
        found.append(
            f"Marks compare with {grid.baseline}: * p < 0.05, ** p < 0.01, *** p < 0.001, after Holm's correction over "
            f"the {len(grid.tests)} comparisons of this table. Tests: {which}."
        )
    return found


def visible(text: str) -> str:
    """Text without what cannot be seen: controls, marks of direction, lone surrogates become one sign."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def text_table(grid: Grid) -> str:
    """The table for a terminal, in aligned columns, with its notes."""
    body = [[visible(text) for text in line] for line in [header(grid), *lines(grid)]]
    widths = [max(len(line[place]) for line in body) for place in range(len(body[0]))]
    table = ["  ".join(t.ljust(width) for t, width in zip(line, widths, strict=True)).rstrip() for line in body]
    return "\n".join([*table, "", *notes(grid)])


def escaped_markdown(text: str) -> str:
    """Text that Markdown shows as it is, also within a table."""
    found = html.escape(visible(text), quote=False)
    return "".join(f"\\{letter}" if letter in "|\\`*_[]" else letter for letter in found)


def markdown(grid: Grid) -> str:
    """The table as Markdown with its notes."""
    safe = escaped_markdown
    body = [header(grid), *lines(grid)]
    table = ["| " + " | ".join(safe(text) for text in line) + " |" for line in body]
    table.insert(1, "|" + "---|" * len(body[0]))
    return "\n".join([*table, "", *map(safe, notes(grid))]) + "\n"


_COLUMNS = ("value", "low", "high", "n", "seeds", "interval", "difference", "p_value", "p_holm", "test")
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "*": r"$^{*}$",
}  # fmt: skip


def tex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_TEX.get(letter, letter) for letter in visible(text))


def latex(grid: Grid) -> str:
    """The table for LaTeX with the booktabs package, its notes below it."""
    columns = "l" * len(grid.labels) + "r" * len(grid.metrics)
    head = " & ".join(tex(text) for text in header(grid)) + r" \\"
    body = [" & ".join(tex(text) for text in line) + r" \\" for line in lines(grid)]
    below = [r"\smallskip", rf"\footnotesize {tex(' '.join(notes(grid)))}"]
    start = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*start, *body, r"\bottomrule", r"\end{tabular}", "", *below]) + "\n"


def csv_text(grid: Grid) -> str:
    """One line per number, with everything known about it; texts that a spreadsheet would run begin with a quote."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*grid.labels, "metric", *_COLUMNS])
    for key in grid.keys:
        for metric in grid.metrics:
            cell, test = grid.cells.get((key, metric)), grid.tests.get((key, metric))
            if cell is None:
                continue
            parts = [part_of(key, label) for label in grid.labels]
            tested = ["", "", "", ""] if test is None else [test.difference, test.p_value, test.adjusted, test.test]
            line = [*parts, metric, cell.value, cell.low, cell.high, cell.n, len(cell.seeds), cell.method, *tested]
            writer.writerow([_harmless(entry) for entry in line])
    return out.getvalue()


def _harmless(entry: object) -> object:
    return f"'{entry}" if isinstance(entry, str) and entry[:1] in ("=", "+", "-", "@", "\t", "\r") else entry


def html_table(grid: Grid) -> str:
    """The table as HTML, escaped."""
    head = "".join(f"<th>{html.escape(visible(text))}</th>" for text in header(grid))
    body = "".join(f"<tr>{''.join(_html_cell(text, at, grid) for at, text in enumerate(line))}</tr>"
                   for line in lines(grid))  # fmt: skip
    below = "".join(f"<p>{html.escape(visible(note))}</p>" for note in notes(grid))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def _html_cell(text: str, place: int, grid: Grid) -> str:
    """A cell; the interval of a number stands below it."""
    words = html.escape(visible(text))
    if place < len(grid.labels) or " (" not in words:
        return f"<td>{words}</td>"
    value, interval = words.removesuffix(")").split(" (", 1)
    return f'<td class="number">{value}<small>{interval}</small></td>'


def as_json(grid: Grid) -> list[dict[str, Any]]:
    """The numbers of the table with their comparisons."""
    found = []
    for (key, metric), cell in grid.cells.items():
        test = grid.tests.get((key, metric))
        about = {name: vars(key)[name] for name in FIELDS} | {"settings": dict(key.settings), "metric": metric}
        numbers = {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n, "seeds": list(cell.seeds)}
        tested = None if test is None else {"with": grid.baseline, **vars(test), "mark": test.mark}
        found.append({**about, **numbers, "interval": cell.method, "world": cell.world, "comparison": tested})
    return found
