"""The table: which tests are made, their correction, and every format with hostile names."""

import csv
import io
import json

import pytest
from report_rows import HOSTILE, outcomes, rate, score
from scipy.stats import ttest_rel

from safeshape.report.grid import make_grid
from safeshape.report.rows import Key
from safeshape.report.tables import WORLD_NOTE
from safeshape.report.texts import as_json, csv_text, html_table, latex, markdown, notes, shown, text_table
from safeshape.stats import mcnemar, two_proportions

STAR = Key(attack="a", defence="star", model="m", judge="oracle")


def test_without_outcomes_prompts_count_as_different():
    grid = make_grid([rate(10), rate(30, defence="sft")], baseline="sft")
    test = grid.tests[STAR, "attack_success"]
    assert test.p_value == pytest.approx(two_proportions(30, 100, 10, 100))
    assert test.difference == pytest.approx(-0.2)
    assert test.test.startswith("Fisher")
    assert shown(grid, STAR, "attack_success") == "10.0*** (5.5 to 17.4, n=100)"


def test_with_outcomes_of_the_same_prompts_the_test_is_paired_whatever_their_order():
    theirs, mine = [1] * 6 + [0] * 4, [0] * 10
    rows = [rate(0, 10), rate(6, 10, defence="sft")]
    paired = [outcomes(mine), outcomes(theirs, defence="sft")]
    test = make_grid(rows, outcomes=paired, baseline="sft").tests[STAR, "attack_success"]
    assert test.p_value == pytest.approx(mcnemar(theirs, mine)[2]) == pytest.approx(2 / 64)
    assert test.test.startswith("McNemar")
    names = [f"p{place}" for place in range(10)]
    turned = [paired[0], outcomes(theirs[::-1], defence="sft", prompts=names[::-1])]
    assert make_grid(rows, outcomes=turned, baseline="sft").tests[STAR, "attack_success"].p_value == test.p_value
    other = [paired[0], outcomes(theirs, defence="sft", prompts=[f"q{place}" for place in range(10)])]
    assert make_grid(rows, outcomes=other, baseline="sft").tests[STAR, "attack_success"].test.startswith("Fisher")


def test_outcomes_that_contradict_their_row_are_refused():
    with pytest.raises(ValueError, match=r"the row says 0.3 of 10, its outcomes 1 of 10"):
        make_grid([rate(3, 10), rate(6, 10, defence="sft")], outcomes=[outcomes([1] + [0] * 9)], baseline="sft")


def test_several_seeds_are_the_units_and_prompts_must_agree():
    mine, theirs = (5, 10, 12), (60, 70, 62)
    rows = [rate(k, seed=s) for s, k in enumerate(mine)] + [
        rate(k, seed=s, defence="sft") for s, k in enumerate(theirs)
    ]
    test = make_grid(rows, baseline="sft").tests[STAR, "attack_success"]
    assert test.p_value == pytest.approx(float(ttest_rel(mine, theirs).pvalue))
    assert test.test.startswith("t over 3 paired seeds")
    # Seeds that agree to the digit have no spread; then the prompts of one seed decide.
    same = [rate(1, seed=s) for s in range(3)] + [rate(3, seed=s, defence="sft") for s in range(3)]
    test = make_grid(same, baseline="sft").tests[STAR, "attack_success"]
    assert test.p_value == pytest.approx(two_proportions(1, 100, 3, 100))
    assert test.p_value > 0.05
    other = [rate(k, seed=s) for s, k in enumerate(mine)]
    other += [rate(k, seed=s + 5, defence="sft") for s, k in enumerate(theirs)]
    assert "Welch" in make_grid(other, baseline="sft").tests[STAR, "attack_success"].test


def test_holms_correction_is_over_the_whole_table():
    def table(more):
        rows = [rate(20), rate(35, defence="sft")]
        rows += [rate(50, metric=f"m{i}", defence=d) for i in range(more) for d in ("star", "sft")]
        return make_grid(rows, baseline="sft").tests[STAR, "attack_success"]

    assert table(0).adjusted == table(0).p_value < 0.05
    assert table(0).mark == "*"
    assert table(4).adjusted == pytest.approx(5 * table(0).p_value)
    assert table(4).mark == ""


def test_what_cannot_be_tested_has_no_mark():
    single = make_grid([score(2.0), score(4.0, defence="sft")], baseline="sft")
    assert single.tests == {}
    assert make_grid([rate(1), rate(2, defence="sft")]).tests == {}  # no baseline was named
    apart = make_grid([rate(1), rate(2, defence="sft", attack="b")], baseline="sft")
    assert apart.tests == {}
    flat = [score(2.0, seed=s) for s in range(3)] + [score(4.0, seed=s, defence="sft") for s in range(3)]
    assert make_grid(flat, baseline="sft").tests == {}


def test_labels_are_what_differs_and_metrics_can_be_chosen():
    rows = [rate(1, settings={"chunk": 1}), rate(2, settings={"chunk": 5}), rate(3, metric="b", settings={"chunk": 5})]
    grid = make_grid(rows, metrics=["b", "attack_success"])
    assert grid.labels == ("chunk",)
    assert grid.metrics == ("b", "attack_success")
    assert text_table(grid).splitlines()[0].split() == ["chunk", "b,", "%", "attack", "success,", "%"]
    assert "-" in text_table(grid)  # chunk 1 has no b
    for settings, message in ({"metrics": ["c"]}, "no row has the metric 'c'"), ({"baseline": "x"}, "baseline 'x'"):
        with pytest.raises(ValueError, match=message):
            make_grid(rows, **settings)
    with pytest.raises(ValueError, match="no rows"):
        make_grid([rate(1, category="c")])


def test_notes_say_the_world_the_method_and_the_tests():
    rows = [rate(k, seed=s, defence=d) for d in ("star", "sft") for s, k in enumerate((5, 10))]
    text = " ".join(notes(make_grid(rows, baseline="sft")))
    assert WORLD_NOTE in text
    assert "t over 2 seeds" in text
    assert "Holm's correction over the 1 comparisons" in text
    real = " ".join(notes(make_grid([rate(1, world=False)])))
    assert WORLD_NOTE not in real


def test_hostile_names_are_harmless_in_every_format():
    grid = make_grid([rate(1), rate(2, defence=HOSTILE), rate(3, defence="=1+1")])
    for text in (html_table(grid), markdown(grid)):
        assert "<script" not in text
        assert "\u202e" not in text
    body = [line for line in markdown(grid).splitlines() if line.startswith("|")]
    assert len(body) == 5  # a head, a rule and three lines: no name broke one
    assert all(line.replace("\\|", "").count("|") == 3 for line in body)
    tex = latex(grid)
    assert r"\$x\_1\$" in tex
    assert "\u202e" not in tex
    lines = list(csv.reader(io.StringIO(csv_text(grid))))
    assert lines[3][0] == "'=1+1"  # not a formula
    assert len({len(line) for line in lines}) == 1
    json.dumps(as_json(grid))


def test_latex_holds_a_whole_table():
    tex = latex(make_grid([rate(10), rate(30, defence="sft")], baseline="sft"))
    assert r"\begin{tabular}{lr}" in tex
    assert r"defence & attack success, \% \\" in tex
    assert r"star & 10.0$^{*}$$^{*}$$^{*}$ (5.5 to 17.4, n=100) \\" in tex
    assert tex.count(r"\begin") == tex.count(r"\end")


def test_csv_and_json_hold_the_numbers_unrounded():
    grid = make_grid([rate(1, 3), rate(2, 3, defence="sft")], baseline="sft")
    first = next(csv.DictReader(io.StringIO(csv_text(grid))))
    assert float(first["value"]) == 1 / 3
    assert float(first["p_holm"]) == grid.tests[STAR, "attack_success"].adjusted
    (cell, other) = as_json(grid)
    assert cell["value"] == 1 / 3
    assert cell["comparison"]["with"] == "sft"
    assert other["comparison"] is None
