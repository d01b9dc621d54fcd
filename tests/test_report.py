"""Intervals, rows, tables, and the page: escaped, self-contained, honest about where it comes from."""

import json
import re

import pytest

from safeshape.evals import Outcome, rate_row
from safeshape.report import WORLD_NOTE, Trajectory, color, markdown_table, text_table, write_report, write_results
from safeshape.stats import wilson
from safeshape.types import Score, Span


def row(defence="star", metric="attack_success", successes=(True, False, False, False), world=True):
    outcome = Outcome(task=metric, answers=("",) * len(successes), successes=tuple(successes))
    return rate_row(outcome, attack="a", defence=defence, model="m", seed=0, judge="oracle", world=world)


def test_wilson_equals_its_formula():
    z, n, k = 1.959963984540054, 150, 3
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert wilson(k, n) == pytest.approx((middle - half, middle + half))
    assert wilson(0, 10)[0] == 0
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="a rate needs"):
            wilson(*bad)


def test_a_row_holds_the_rate_its_n_and_interval(tmp_path):
    write_results(tmp_path / "results.json", [row()])
    (saved,) = json.loads((tmp_path / "results.json").read_text())
    assert saved["value"] == 0.25
    assert saved["n"] == 4
    assert (saved["low"], saved["high"]) == wilson(1, 4)
    keys = {"attack", "defence", "model", "seed", "metric", "value", "n", "low", "high", "judge", "world"}
    assert set(saved) == {*keys, "settings", "category"}


def test_tables_show_percent_interval_and_n():
    assert "| star | 25.0 (4.6-69.9, n=4) |" in markdown_table([row()])
    assert "star  25.0 (4.6-69.9, n=4)" in text_table([row()])


def trajectory(answer):
    spans = (Span(start=0, end=len(answer) // 2, p_safe=1.0), Span(start=len(answer) // 2, end=len(answer), p_safe=0.0))
    return Trajectory(
        label="x", prompt=answer, answer=answer, score=Score(signal="s", p_safe=0.0, spans=spans, scorer={})
    )


def test_the_page_is_self_contained_and_escapes_everything(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    path = tmp_path / "report.html"
    write_report(
        path, title=attack, rows=[row(defence=attack)], trajectories=[trajectory(attack)], facts={attack: attack}
    )
    page = path.read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert WORLD_NOTE in page


def test_the_world_note_stands_only_where_the_world_was_measured(tmp_path):
    write_report(
        tmp_path / "r.html", title="t", rows=[row(world=False)], trajectories=[trajectory("one two")], facts={}
    )
    assert WORLD_NOTE not in (tmp_path / "r.html").read_text()


def test_colors_run_from_red_over_white_to_green():
    assert color(0.5) == "rgb(255,255,255)"
    assert color(0.0) == "rgb(224,116,112)"
    assert color(1.0) == "rgb(98,168,129)"
