"""A matrix file to cells."""

import pytest

from safeshape.bench import read_matrix

EXPERIMENTS = {
    "rates": {
        "model": "world:llama",
        "attack": "harmful_only",
        "defence": ["sft", {"name": "star", "kl": 0.5}],
        "seed": [0, 1, 2],
        "settings": {"learning_rate": [1e-4, 1e-5]},
    },
    "plain": {"model": ["world:llama", "world:phi3"], "attack": "harmful_only", "defence": "sft", "seed": 0},
}


def matrix(experiments=EXPERIMENTS, settings=None, scales=None, scale="default"):
    return read_matrix(experiments, settings or {"rows": 100, "learning_rate": 1e-4}, scales or {}, scale)


def test_lists_multiply_and_shared_cells_are_run_once():
    found = matrix()
    assert len(found.experiments["rates"]) == 2 * 2 * 3
    assert len(found.experiments["plain"]) == 2
    # sft on llama with seed 0 and rate 1e-4 belongs to both.
    assert len(found.cells) == 12 + 2 - 1
    assert len(set(found.experiments["rates"]) & set(found.experiments["plain"])) == 1
    assert {cell.settings["rows"] for cell in found.cells} == {100}


def test_a_scale_replaces_single_entries():
    scales = {"full": {"settings": {"rows": 400}, "experiments": {"rates": {"seed": [0, 1, 2, 3, 4]}}}}
    found = matrix(scales=scales, scale="full")
    assert len(found.experiments["rates"]) == 2 * 2 * 5
    assert len(found.experiments["plain"]) == 2
    assert {cell.settings["rows"] for cell in found.cells} == {400}
    assert {c.settings["learning_rate"] for c in found.cells} == {1e-4, 1e-5}
    # Seeds of all experiments, where none has its own.
    scales["full"] |= {"seed": [7, 8]}
    found = matrix(scales=scales, scale="full")
    assert {name: len(keys) for name, keys in found.experiments.items()} == {"rates": 2 * 2 * 5, "plain": 2 * 2}


def test_everything_that_changes_a_result_changes_the_key():
    base = {"model": "m", "attack": "a", "defence": "d", "seed": 0, "settings": {"x": 1}}
    changes = {"model": "n", "attack": {"name": "a", "ratio": 0.1}, "defence": "e", "seed": 1, "settings": {"x": 2}}
    keys = {matrix({"e": base | {axis: value}}).cells[0].key() for axis, value in changes.items()}
    keys.add(matrix({"e": base}).cells[0].key())
    keys.add(matrix({"e": base}, settings={"other": 1}).cells[0].key())
    assert len(keys) == len(changes) + 2


def test_a_name_says_what_a_cell_is_and_is_a_safe_folder_name():
    cell = matrix({"e": {"model": "../my/model", "attack": "a b", "defence": "mine:f", "seed": 7}}).cells[0]
    assert cell.name().startswith("..-my-model_a-b_mine-f_seed7_")
    assert "/" not in cell.name()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "0"}, "seed must be a whole number, got '0'"),
        ({"seed": True}, "seed must be a whole number"),
        ({"attack": {"ratio": 1}}, "attack must be a name or a mapping with one"),
        ({"learning_rate": 1}, "unknown entry 'learning_rate'"),
        ({"settings": 3}, "settings must be a mapping"),
    ],
)
def test_bad_entries_are_named(change, words):
    base = {"model": "m", "attack": "a", "defence": "d", "seed": 0}
    with pytest.raises(ValueError, match=words):
        matrix({"mine": base | change})


def test_a_missing_axis_an_unknown_scale_and_an_empty_matrix_are_refused():
    with pytest.raises(ValueError, match="mine: defence must be given"):
        matrix({"mine": {"model": "m", "attack": "a", "seed": 0}})
    with pytest.raises(ValueError, match="no scale 'huge'; it has: default, full"):
        matrix(scales={"full": {}}, scale="huge")
    with pytest.raises(ValueError, match="there is no experiment 'other'"):
        matrix(scales={"full": {"experiments": {"other": {}}}}, scale="full")
    with pytest.raises(ValueError, match="no experiments"):
        matrix({})
