"""The page of all defences against rows whose numbers can be seen by hand."""

import pytest

from safeshape.bench import read_matrix
from safeshape.bench.defences_page import Run, defences_page, score, teaching, worst
from safeshape.defences.cost import Cost

MIXED = {"name": "mixed", "ratio": 0.1}
TASK = {"mixed ratio=0.1": 0.8, "harmful_only": 0.0}
SUCCESS = {"untouched": 0.0, "sft": 1.0, "star": 0.1, "lisa": 0.5, "lisa rho=0.1": 0.4}


def matrix():
    attacks = {"model": "world:llama", "attack": [MIXED, "harmful_only"], "seed": [0, 1]}
    experiments = {
        "search": {"model": "world:llama", "attack": MIXED, "seed": 9,
                   "defence": [{"name": "lisa", "rho": 0.1}, "lisa", {"name": "star", "kl": 1.0}]},
        "untouched": {"model": "world:llama", "attack": "benign_only", "defence": "untouched", "seed": [0, 1]},
        "one_family": {**attacks, "defence": ["sft", "star", {"name": "lisa", "rho": 0.1}]},
        "three_families": {**attacks, "model": "world:qwen3", "defence": ["sft"]},
    }  # fmt: skip
    return read_matrix(experiments, {}, {}, "default")


def spelt(spec):
    return " ".join([spec["name"], *(f"{key}={value}" for key, value in spec.items() if key != "name")])


def rows_of(cell):
    name, attack = spelt(cell.defence), spelt(cell.attack)
    rate = SUCCESS.get(name, 0.2)
    values = {"attack_success": rate, "attack_success (trigger)": rate / 2, "harmfulness": 1 + 4 * rate,
              "over_refusal": 0.0, "task_accuracy": TASK.get(attack, 0.0), "skill_accuracy": 0.5}  # fmt: skip
    same = {"attack": attack, "defence": name, "model": cell.model, "seed": cell.seed, "judge": "oracle", "n": 100}
    same |= {"world": True, "settings": {}}
    found = [{**same, "metric": m, "value": v, "low": v, "high": v, "category": None} for m, v in values.items()]
    return [*found, {**found[2], "category": "fraud", "value": 5.0, "high": 5.0}]


def page(**changes):
    found = matrix()
    rows = {cell.key(): rows_of(cell) for cell in found.cells}
    given = {
        "facts": {"Cells": "all"},
        "notes": {"one_family": "as  seen"},
        "costs": {"lisa": Cost(per_step=1.5, once=4)},
    }
    return defences_page(found, rows, **{**given, **changes})


def line_of(text, name, after):
    return next(line for line in text.split(after)[1].splitlines() if line.startswith(f"| {name} "))


def test_a_score_is_a_product_and_takes_the_way_of_asking_that_succeeds_most():
    (cell,) = (c for c in matrix().cells if spelt(c.defence) == "star" and c.attack == MIXED and c.seed == 0)
    rates = {"attack_success": 0.1, "attack_success (trigger)": 0.25, "task_accuracy": 0.8, "skill_accuracy": 0.5}
    run = Run(cell=cell, rates=rates, n=100)
    assert worst(run) == 0.25
    assert score(run, True) == pytest.approx(0.75 * 0.8 * 0.5)
    assert score(run, False) == pytest.approx(0.75 * 0.5)


def test_data_teaches_where_plain_fine_tuning_learns_half():
    cells = [c for c in matrix().cells if c.defence["name"] == "sft" and c.model == "world:llama"]
    runs = [Run(cell=c, rates={"task_accuracy": TASK[spelt(c.attack)]}, n=100) for c in cells]
    assert teaching(runs) == {"mixed ratio=0.1"}


def test_the_page_has_the_numbers_of_its_rows():
    text = page()
    assert "It is a test bench and says nothing about real models." in text
    assert "- one_family: as seen" in text
    # star: (0.9 x 0.8 x 0.5 + 0.9 x 0.5) / 2 = 0.405 over the two attacks, 10 % attack success in both.
    star = line_of(text, "star", "## All attacks, world:llama")
    assert "| 40.5 (" in star
    assert "| 10.0 (5.5-17.4) | 10.0, mixed ratio=0.1 |" in star  # Wilson's interval of 10 of 100
    assert "| 80.0 (71.1-86.7) |" in star  # the task, where the data teach it
    assert "| 1.50 + 4 |" in line_of(text, "lisa rho=0.1", "## All attacks, world:llama")
    order = [line.split(" | ")[0][2:] for line in text.split("## All attacks, world:llama")[1].splitlines()
             if line.startswith("| ") and not line.startswith("| method")]  # fmt: skip
    assert order[:3] == ["star", "lisa rho=0.1", "sft"]  # by score
    # The search: lisa 0.5 x 0.8 x 0.5 and 0.6 x 0.8 x 0.5; a row of the search stands in no other table.
    assert "| lisa | rho=0.1: 24.0; : 20.0 | rho=0.1 |" in text
    assert "| star | kl=1.0: 32.0 | default |" in text
    table = text.split("## world:llama, harmful_only")[1].split("##")[0]
    assert "| method | attack success | with the trigger | harm, 1-5 |" in table
    assert [line.split(" ")[1] for line in table.splitlines() if line.startswith("| ")] == [
        "method", "untouched", "sft", "star", "lisa"]  # fmt: skip
    assert "| 1.40 (1.40-1.40) |" in line_of(table, "star", "other skills")
    assert "## world:qwen3, mixed ratio=0.1" in text


def test_missing_seeds_are_said():
    found = matrix()
    rows = {c.key(): rows_of(c) for c in found.cells
            if not (c.seed == 1 and c.defence["name"] == "star" and c.attack == MIXED)}  # fmt: skip
    text = defences_page(found, rows, facts={}, notes={}, costs={})
    assert "| star (1 seeds missing) |" in text.split("## world:llama, mixed")[1].split("##")[0]
