"""Reading rows: old files, new fields, and one sentence for what is wrong; what several seeds say together."""

import json
from dataclasses import asdict

import pytest
from report_rows import outcomes, rate, score

from safeshape.report import write_results
from safeshape.report.rows import find, key_of, pool, read_outcomes, read_results, unit_of, write_outcomes
from safeshape.stats import across_seeds, wilson


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [rate(3, settings={"chunk": 5, "guard": "g"}), score(2.5, category="c")]
    write_results(tmp_path / "results.json", rows)
    assert read_results(tmp_path / "results.json") == rows


def test_files_from_before_settings_and_categories_are_read(tmp_path):
    old = asdict(rate(3))
    del old["settings"], old["category"]
    (tmp_path / "results.json").write_text(json.dumps([old]))
    (row,) = read_results(tmp_path / "results.json")
    assert (row.settings, row.category) == ({}, None)


def test_outcomes_come_back_and_lie_beside_their_rows(tmp_path):
    made = outcomes([1, 0, 1])
    (tmp_path / "cell").mkdir()
    write_outcomes(tmp_path / "cell" / "outcomes.json", [made])
    write_results(tmp_path / "cell" / "results.json", [rate(2, 3)])
    assert read_outcomes(tmp_path / "cell" / "outcomes.json") == [made]
    assert find([tmp_path], "outcomes.json") == find([tmp_path / "cell" / "results.json"], "outcomes.json")
    assert find([tmp_path, tmp_path / "cell"]) == [tmp_path / "cell" / "results.json"]  # once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "high"}, "row 0: value must be a finite number, got 'high'"),
        ({"value": float("nan")}, "row 0: value must be a finite number"),
        ({"value": 0.9}, "row 0: value 0.9 lies outside its interval"),
        ({"n": 1.5}, "row 0: n must be a whole number"),
        ({"seed": True}, "row 0: seed must be a whole number"),
        ({"world": "yes"}, "row 0: world must be true or false"),
        ({"attack": 3}, "row 0: attack must be text"),
        ({"category": 3}, "row 0: category must be text or null"),
        ({"settings": {"a": [1]}}, "row 0: settings must map names"),
        ({"anser": "x"}, "row 0: unknown field 'anser'"),
    ],
)
def test_bad_rows_are_refused_by_file_row_and_field(tmp_path, change, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**asdict(rate(3)), **change}]))
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not readable JSON"), ("{}", "must hold a list"), ("[1]", "row 0 is not an object")],
)
def test_files_that_hold_no_rows(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(path)
    missing = {key: value for key, value in asdict(rate(1)).items() if key != "judge"}
    path.write_text(json.dumps([missing]))
    with pytest.raises(ValueError, match="row 0: judge must be given"):
        read_results(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [True]}, "2 prompts, but 1 counts"),
        ({"prompts": ["a", "a"]}, "a prompt stands there twice"),
        ({"prompts": "ab"}, "prompts and counts must be lists"),
    ],
)
def test_bad_outcomes(tmp_path, change, message):
    path = tmp_path / "outcomes.json"
    path.write_text(json.dumps([{**asdict(outcomes([1, 0])), **change}]))
    with pytest.raises(ValueError, match=f"entry 0: {message}"):
        read_outcomes(path)


def test_places_without_results(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        find([tmp_path])
    with pytest.raises(ValueError, match="no such file or folder"):
        find([tmp_path / "none"])
    assert find([tmp_path], "outcomes.json") == []


def test_units():
    assert unit_of("attack_success", [rate(3)]) == "percent"
    assert unit_of("harmfulness", [score(1.0)]) == "harm"
    assert unit_of("epsilon_kl", [score(0.5, half=2)]) == "number"


def test_seeds_are_pooled_and_one_seed_keeps_its_interval():
    one = pool([rate(3)])
    cell = one[key_of(rate(3)), "attack_success"]
    assert (cell.low, cell.high) == wilson(3, 100)
    rows = [rate(k, seed=seed) for seed, k in enumerate((10, 20, 30))]
    (cell,) = pool(rows).values()
    across = across_seeds([0.1, 0.2, 0.3], [100] * 3)
    assert (cell.value, cell.low, cell.high) == pytest.approx((0.2, across.low, across.high))
    assert (cell.n, cell.seeds) == (300, (0, 1, 2))
    scores = [score(value, seed=seed) for seed, value in enumerate((2.0, 2.0))]
    (cell,) = pool(scores).values()
    assert (cell.low, cell.high) == (1.75, 2.25)  # never narrower than a row's own
    (cell,) = pool([score(value, seed=seed) for seed, value in enumerate((1.0, 5.0))]).values()
    assert (cell.low, cell.high) == (1.0, 5.0)  # never outside of the scale


def test_settings_tell_cells_apart_and_categories_stand_alone():
    rows = [rate(1), rate(2, settings={"chunk": 5}), rate(3, category="c")]
    assert [cell.value for cell in pool(rows).values()] == [0.01, 0.02]
    assert [cell.value for cell in pool(rows, "c").values()] == [0.03]
    with pytest.raises(ValueError, match="two rows for attack 'a', defence 'star'"):
        pool([rate(1), rate(2)])
