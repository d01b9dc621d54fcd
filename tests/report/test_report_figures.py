"""Figures hold the numbers of their rows, refuse what they cannot show, and are the same files again."""

import math
from dataclasses import replace

import pytest
from report_rows import CATEGORIES, HOSTILE, rate, score

from safeshape.report.curves import curve_figure, panel_figures, scatter_figures, varying
from safeshape.report.drawing import save
from safeshape.report.grid import make_grid
from safeshape.report.places import Place, told_apart
from safeshape.report.radar import by_category, radar_figure


def texts(figure):
    return [text.get_text().replace("\u200b", "") for text in figure.findobj(lambda item: hasattr(item, "get_text"))]


def radar_rows():
    before = [score(1.0 + 0.1 * place, category=c, defence="untouched", attack="none") for place, c in
              enumerate(CATEGORIES)]  # fmt: skip
    return before + [score(4.0, category=c, defence="sft") for c in CATEGORIES]


def test_a_radar_has_a_spoke_a_category_and_a_closed_polygon_a_model():
    figure = radar_figure(radar_rows(), "harmfulness")
    (axis,) = figure.axes
    assert [label.get_text().strip("\u200b") for label in axis.get_xticklabels()] == CATEGORIES
    polygons = [line for line in axis.lines if len(line.get_ydata()) == len(CATEGORIES) + 1]
    assert len(polygons) == 2
    assert list(polygons[0].get_ydata())[:3] == pytest.approx([1.0, 1.1, 1.2])
    assert polygons[0].get_ydata()[0] == polygons[0].get_ydata()[-1]
    assert axis.get_ylim() == (1.0, 5.0)
    assert "untouched (n=30 a category)" in texts(figure)
    percent = radar_figure([rate(50, category=c) for c in CATEGORIES], "attack_success")
    assert percent.axes[0].get_ylim() == (0.0, 100.0)


def test_a_radar_refuses_what_would_mislead():
    with pytest.raises(ValueError, match="at least three categories"):
        by_category(radar_rows()[:2], "harmfulness")
    with pytest.raises(ValueError, match="'sft' has no 'harmfulness' for category 'category k'"):
        by_category(radar_rows()[:-1], "harmfulness")
    with pytest.raises(ValueError, match="several attacks"):
        by_category([*radar_rows(), score(2.0, category=CATEGORIES[0], defence="sft", attack="b")], "harmfulness")


def rates(setting, values, defence="star"):
    return [rate(10 * place, defence=defence, settings={setting: value}) for place, value in enumerate(values)]


def test_a_curve_goes_over_the_setting_in_order_with_whiskers():
    grid = make_grid([*rates("harmful_share", (0.5, 0.0, 1.0)), rate(4, defence="untouched", attack="none")])
    assert varying(grid) == ["harmful_share"]
    (axis,) = curve_figure(grid, "attack_success", "harmful_share").axes
    line = next(line for line in axis.lines if len(line.get_xdata()) == 3)
    assert list(line.get_xdata()) == [0.0, 50.0, 100.0]
    assert list(line.get_ydata()) == pytest.approx([10.0, 0.0, 20.0])
    low = grid.cells[grid.keys[0], "attack_success"].high
    tops = [path.vertices[:, 1].max() for item in axis.collections for path in item.get_paths()]
    assert any(math.isclose(top, 100 * low) for top in tops)
    flat = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert list(flat[0].get_ydata()) == [4.0, 4.0]  # the model before any attack


def test_learning_rates_are_on_a_logarithmic_axis_and_shares_are_not():
    rows = rates("learning_rate", (2e-7, 2e-6, 2e-5, 2e-4))
    grid = make_grid(rows)
    assert curve_figure(grid, "attack_success", "learning_rate").axes[0].get_xscale() == "log"
    linear = curve_figure(grid, "attack_success", "learning_rate", logarithmic=False)
    assert linear.axes[0].get_xscale() == "linear"
    assert (
        curve_figure(make_grid(rates("harmful_share", (0.1, 0.2))), "attack_success", "harmful_share")
        .axes[0]
        .get_xscale()
        == "linear"
    )
    # A weight of 0 has no place on a logarithmic axis.
    zero = make_grid(rates("kl", (0, 0.5, 1)))
    assert curve_figure(zero, "attack_success", "kl").axes[0].get_xscale() == "linear"


def test_other_settings_and_attacks_are_lines_and_panels_of_their_own():
    rows = [
        rate(5 * place, settings={"chunk": chunk, "kl": kl}, attack=attack)
        for attack in ("a", "b")
        for kl in (0.5, 1.0)
        for place, chunk in enumerate((1, 5, 10))
    ]
    figure = curve_figure(make_grid(rows), "attack_success", "chunk")
    assert titles(figure) == ["a", "b"]
    assert {"star (kl 0.5)", "star (kl 1)"} <= set(texts(figure))
    assert varying(make_grid(rows)) == ["chunk", "kl"]
    # Other settings than a defence's own make panels, and what does not vary anywhere is no axis.
    rows = [rate(place, settings={"chunk": chunk, "epochs": epochs, "rows": 9}) for epochs in (6, 20)
            for place, chunk in enumerate((1, 5, 10)[: epochs // 6])]  # fmt: skip
    assert varying(make_grid(rows)) == ["chunk", "epochs"]
    figure = curve_figure(make_grid([*rows, rate(1, defence="sft", settings={"epochs": 20, "rows": 9})]),
                          "attack_success", "chunk")  # fmt: skip
    assert titles(figure) == ["a"]  # 6 epochs were run with one chunk size alone
    (flat,) = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert flat.get_label().strip("\u200b") == "sft"  # has no chunk size, and is of the same attack and settings


def test_what_an_axis_shows_is_left_out_of_the_names():
    def at(share, value, defence="star", **more):
        own = {"harmful_share": share, "rows": 9, **({"kl": 1.0} if "kl" in defence else {})}
        safe = f" safe_ratio={1 - share:g}" if more else ""
        return rate(value, attack=f"mixed ratio={share:g}{safe}", defence=defence, settings=own)

    figure = curve_figure(make_grid([at(0.1, 1), at(0.2, 2), at(0.2, 3, "star kl=1.0")]),
                          "attack_success", "harmful_share")  # fmt: skip
    assert titles(figure) == ["mixed"]
    assert list(figure.axes[0].lines[0].get_xdata()) == [10, 20]
    assert "star kl=1.0" not in texts(figure)  # one point is no line
    whole = [at(0.2, 1, safe=1), at(0.8, 2, safe=1)]
    assert titles(curve_figure(make_grid(whole), "attack_success", "harmful_share")) == ["mixed"]
    weights = [rate(place, defence=f"star kl={kl}", settings={"kl": kl}) for place, kl in enumerate((0.5, 1.0))]
    figure = curve_figure(make_grid(weights), "attack_success", "kl")
    assert "star" in texts(figure)
    assert [label.strip("\u200b") for label in tick_labels(figure)] == ["0.5", "1"]
    with pytest.raises(ValueError, match="several lines of the table fall on one point"):
        curve_figure(make_grid([*weights, rate(1, settings={"kl": 0.5})]), "attack_success", "kl")


def test_places_are_told_apart_by_no_more_than_it_takes():
    one = Place(attack="a", model="m", settings=(("epochs", 6), ("rows", 9)))
    assert told_apart([one]) == ["a"]
    assert told_apart([one, replace(one, settings=(("epochs", 20), ("rows", 90)))]) == ["a, epochs 6", "a, epochs 20"]
    assert told_apart([one, replace(one, model="n"), replace(one, model="n", judge="j")]) == ["a, m", "a, n", "a, n, j"]
    assert told_apart([one, replace(one, settings=())]) == ["a, epochs 6", "a"]


def titles(figure):
    return [axis.get_title().replace("\u200b", "") for axis in figure.axes]


def tick_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_what_a_row_does_not_name_is_no_axis():
    rows = rates("chunk", (1, 5))
    with pytest.raises(ValueError, match="needs at least two values of 'seed'"):
        curve_figure(make_grid(rows), "attack_success", "seed")


def test_the_scatter_has_a_mark_a_line_with_whiskers_both_ways():
    rows = [rate(10), rate(90, metric="task_accuracy"), rate(80, defence="sft"),
            rate(95, defence="sft", metric="task_accuracy"), rate(1, defence="untouched", attack="none"),
            rate(2, defence="untouched", attack="none", metric="task_accuracy")]  # fmt: skip
    (figure,) = scatter_figures(make_grid(rows), "attack_success", "task_accuracy")
    (axis,) = figure.axes  # the untouched model stands in the panel of the attack
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() in "os^"]
    assert [tuple(map(round, mark)) for mark in marks] == [(90, 10), (95, 80), (2, 1)]
    with pytest.raises(ValueError, match="no line of the table has both"):
        scatter_figures(make_grid([rate(1), rate(2, defence="b", metric="skill")]), "attack_success", "skill")


def test_the_scatter_joins_what_was_measured_on_different_data_sets():
    def on(name, value, **more):
        return rate(value, settings={"dataset": name, "decoding": "greedy", **more.pop("settings", {})}, **more)

    rows = [on("requests", 10, settings={"threshold": 4}), on("sums", 90, metric="accuracy", judge="rules"),
            on("words", 70, metric="accuracy", judge="rules"),
            on("sums", 60, metric="accuracy", defence="other")]  # fmt: skip
    (figure,) = scatter_figures(make_grid(rows), "attack_success", "accuracy")
    marks = [[(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() in "os^"]
             for axis in figure.axes]  # fmt: skip
    assert [[tuple(map(round, mark)) for mark in panel] for panel in marks] == [[(90, 10)], [(70, 10)]]
    titles = [axis.get_title().replace("\u200b", "").splitlines()[-1] for axis in figure.axes]
    assert titles == ["requests, sums", "requests, words"]


def test_panels_group_bars_by_model_or_setting():
    rows = [rate(10 * place, model=model, defence=defence) for place, (model, defence) in
            enumerate((m, d) for m in ("one", "two") for d in ("sft", "star"))]  # fmt: skip
    (axis,) = panels(rows, "model")[""].axes
    assert sorted(bar.get_height() for bar in axis.patches) == pytest.approx([0, 10, 20, 30])
    assert [label.get_text().strip("\u200b") for label in axis.get_xticklabels()] == ["one", "two"]
    assert axis.get_xlim() == (-0.5, 1.5)
    (axis,) = panels(rows[:3], "model")[""].axes  # one defence is missing on "two"
    assert axis.get_xlim() == (-0.5, 1.5)
    guards = [rate(5, settings={"guard": name}) for name in ("g", "h")]
    assert len(panels(guards, "guard")[""].axes[0].patches) == 2
    with pytest.raises(ValueError, match="several lines of the table fall on one bar"):
        panels([*rows, rate(9, model="one", defence="sft", judge="other")], "model")
    with pytest.raises(ValueError, match="at least two"):
        panels(rows, "judge")
    with pytest.raises(ValueError, match="with all else the same"):
        panels([rate(1, model="one", attack="a"), rate(1, model="two", attack="b")], "model")


def test_a_matrix_has_a_figure_of_panels_for_each_attack_with_two_models():
    rows = [rate(5, model=model, attack=attack) for attack in ("a", "b") for model in ("one", "two")]
    before = [rate(1, model=model, attack="none", defence="untouched") for model in ("one", "two")]
    found = panels([*rows, *before, rate(9, model="one", attack="c")], "model")
    assert list(found) == ["a", "b"]
    assert [titles(figure) for figure in found.values()] == [["a"], ["b"]]
    assert all(len(figure.axes[0].patches) == 4 for figure in found.values())  # the state before beside each


def test_a_wide_matrix_has_scatters_of_twelve_panels_and_none_of_a_single_mark():
    rows = [rate(5, metric=metric, defence=defence, attack=f"a{place}") for place in range(14)
            for defence in ("sft", "star") for metric in ("attack_success", "skill")]  # fmt: skip
    rows += [rate(5, metric=metric, attack="alone") for metric in ("attack_success", "skill")]
    found = scatter_figures(make_grid(rows), "attack_success", "skill")
    shown = [[axis.get_title().strip("\u200b") for axis in figure.axes if axis.get_visible()] for figure in found]
    assert shown == [[f"a{place}" for place in range(12)], ["a12", "a13"]]


def panels(rows, by):
    found = panel_figures(make_grid(rows), ["attack_success"], by)
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def test_hostile_names_are_drawn_as_text_and_files_are_the_same_again(tmp_path):
    rows = [row for d in (HOSTILE, "_hidden", "$\\frac{$") for row in rates("chunk", (1, 5), defence=d)]
    grid = make_grid(rows)
    files = []
    for name in ("one", "two"):
        figure = curve_figure(grid, "attack_success", "chunk", text="note")
        files.append([path.read_bytes() for path in save(figure, tmp_path / name)])
    assert files[0] == files[1]
    assert "_hidden" in texts(figure)  # a leading underscore does not hide a series
    assert b"<script" not in files[0][1]
