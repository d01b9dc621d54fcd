"""The matrix of defences: every method, every attack, the same budget of search for all; none is run here."""

from collections import Counter
from functools import cache
from pathlib import Path

import yaml

from safeshape.attacks import data_attack
from safeshape.bench.in_world import attacked, settings_of
from safeshape.bench.matrix import read_matrix
from safeshape.defences import DEFENCES, resolve_defence
from safeshape.world.pools import texts

PATH = Path(__file__).parents[2] / "recipes" / "bench" / "defences.yaml"
CONTENT = yaml.safe_load(PATH.read_text())
# What has no knob to search, or whose knobs are those of its method without the divergence.
WITHOUT_SEARCH = {"sft", "soft_weight", "star_weight", "adaptive_weight", "ptst"}
ATTACKS = {"harmful_only", "mixed", "benign_only", "suffix", "prefix", "trigger", "embedded", "adaptive"}


@cache
def cells(scale="default"):
    matrix = read_matrix(CONTENT["experiments"], CONTENT["settings"], CONTENT["scales"], scale)
    by_key = {cell.key(): cell for cell in matrix.cells}
    return {name: [by_key[key] for key in keys] for name, keys in matrix.experiments.items()}


def test_every_defence_meets_every_attack_with_three_seeds():
    for scale, seeds in (("default", 3), ("full", 10)):
        found = cells(scale)["one_family"]
        met = Counter((cell.defence["name"], cell.attack["name"]) for cell in found)
        assert set(met) == {(defence, attack) for defence in DEFENCES for attack in ATTACKS}
        assert set(met.values()) == {seeds}


def test_every_cell_can_be_begun():
    for cell in (cell for scale in ("default", "full") for several in cells(scale).values() for cell in several):
        settings_of(cell)
        if cell.defence["name"] != "untouched":
            defence = resolve_defence(cell.defence)
            assert cell.model == "world:llama" or "base_model" not in defence.needs
        parameters = {**texts(cell.attack["name"]), **{k: v for k, v in cell.attack.items() if k != "name"}}
        data_attack(cell.attack["name"], parameters)


def test_the_search_gives_every_method_the_same_budget_on_a_seed_of_its_own():
    found = cells()
    budget = Counter(cell.defence["name"] for cell in found["search"])
    assert set(budget) == set(DEFENCES) - WITHOUT_SEARCH
    assert set(budget.values()) == {3}
    searched = {cell.seed for cell in found["search"]}
    assert not searched & {cell.seed for name, several in found.items() if name != "search" for cell in several}


def test_every_attack_finds_its_rows():
    """The adaptive one, which scores them first, takes as many as `mixed`."""
    for scale in ("default", "full"):
        for cell in {cell.attack["name"]: cell for cell in cells(scale)["one_family"]}.values():
            if cell.attack["name"] != "adaptive":
                assert len(attacked(cell, settings_of(cell))[0]) == cell.settings["rows"]


def test_plain_fine_tuning_and_ten_methods_go_on_to_the_other_families_as_they_were():
    found = cells()["three_families"]
    defences = {str(cell.defence) for cell in found}
    assert len(defences - {"{'name': 'sft'}"}) == 10
    assert defences < {str(cell.defence) for cell in cells()["one_family"]}
    assert {cell.model for cell in found} == {"world:qwen3", "world:phi3"}
