"""`docs/reproduction.md` from the rows of the shipped matrix."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

from safeshape.bench.facts import Rows
from safeshape.bench.matrix import Cell, Matrix
from safeshape.bench.reproduction import Ordering, claimed, conditions, orderings, shown_rate
from safeshape.report import WORLD_NOTE

INTRODUCTION = """\
This page is written by `safeshape bench` from the rows of `recipes/bench/reproduction.yaml`, never by hand; the notes
marked "Why" are ours, from `recipes/bench/reproduction-notes.yaml`. What is compared is which of two conditions is
safer, not how much: the papers fine-tune models of one to eight billion parameters, the world's have 0.9 million.

Numbers of the papers are as printed. The world's are attack success in percent of held-out harmful requests, judged by
the exact oracle: mean over seeds, 95 % interval, seeds x prompts. An ordering of the papers counts where its two
numbers differ by more than the 95 % noise of their prompts. The world agrees or disagrees where the 95 % interval of
the difference leaves out zero; each comparison stands alone, none is corrected for their number."""


def papers() -> dict[str, Any]:
    """The papers' tables and claims, as shipped."""
    return dict(yaml.safe_load((files("safeshape.bench") / "assets" / "papers.yaml").read_text()))


def reproduction_page(
    matrix: Matrix, rows: Rows, *, facts: Mapping[str, str], notes: Mapping[str, str], content: Mapping[str, Any]
) -> str:
    """The page as Markdown. `facts`: about the run. `notes`: our reading, by experiment. `content`: of `papers`.

    Errors: ValueError as `check_matrix`.
    """
    check_matrix(matrix, content)
    parts, verdicts = [], Counter[str]()
    for table in content["tables"]:
        found = conditions(table, _cells(matrix, table["experiment"]), rows)
        pairs = orderings(table, found)
        verdicts.update(pair.verdict for pair in pairs)
        parts.append("\n".join([*_table(table, found), "", *_pairs(pairs)]))
    for claim in content["claims"]:
        groups = claimed(claim, _cells(matrix, claim["experiment"]), rows)
        verdicts.update(pair.verdict for _, pair in groups)
        lines = [f"## {claim['text']}", "", f"{claim['source']}.", ""]
        parts.append("\n".join([*lines, *(f"- {where or 'all'}: {_sentence(pair)}" for where, pair in groups)]))
    explained = {e["experiment"] for e in (*content["tables"], *content["claims"])}
    why = [f"- {name}: {' '.join(notes[name].split())}" for name in notes if name in explained]
    counts = ", ".join(f"{verdicts[name]} {name}" for name in ("agrees", "disagrees", "undecided"))
    head = ["# The papers' experiments in the embedded world", "", WORLD_NOTE, "", INTRODUCTION, ""]
    head += [*(f"- {name}: {value}" for name, value in facts.items()), "", f"Orderings: {counts}.", ""]
    return "\n".join([*head, *(["## Why", "", *why, ""] if why else []), "\n\n".join(parts), ""])


def check_matrix(matrix: Matrix, content: Mapping[str, Any]) -> None:
    """Errors: ValueError when a table or a claim names an experiment that the matrix lacks."""
    for entry in (*content["tables"], *content["claims"]):
        if entry["experiment"] not in matrix.experiments:
            raise ValueError(f"the matrix has no experiment {entry['experiment']!r}, which the papers' tables name")


def _cells(matrix: Matrix, experiment: str) -> list[Cell]:
    wanted = set(matrix.experiments[experiment])
    return [cell for cell in matrix.cells if cell.key() in wanted]


def _table(table: Mapping[str, Any], found: Mapping[Any, Any]) -> list[str]:
    other = [f"{key.removesuffix('.name')} {value}" for key, value in table.get("where", {}).items()]
    lines = [f"## {table['title']}", "", f"{table['source']}, {table['place']}: {table['quantity']}."]
    lines += [f"In the world: {', '.join(other)}." if other else "", ""]
    lines += [f"| {table['axis'].removesuffix('.name')} | paper | world, attack success |", "|---|---|---|"]
    lines += [f"| {value} | {number} | {shown_rate(found.get(value))} |" for value, number in table["values"].items()]
    lines += [f"| {name} | {number} | not run |" for name, number in table.get("not_run", {}).items()]
    return [line for place, line in enumerate(lines) if line or place in (1, 4)]


def _pairs(pairs: Sequence[Ordering]) -> list[str]:
    if not pairs:
        return ["No ordering of this table is beyond the noise of its prompts and has cells."]
    return [f"- {_sentence(pair)}" for pair in pairs]


def _sentence(pair: Ordering) -> str:
    """Whether the first is safer in the world too: the second's attack success minus the first's, in points."""
    span = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
    return f"{pair.safer} safer than {pair.riskier}: **{pair.verdict}** ({100 * pair.difference:+.1f} points, {span})"
