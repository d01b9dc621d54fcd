"""A cell on the embedded world, and the knobs of its data."""

import json

import pytest
from datasets import Dataset

from safeshape.bench import Cell
from safeshape.bench.cell import run_cell
from safeshape.bench.in_world import attacked, missed, settings_of
from safeshape.cli import main


def cell(defence="untouched", attack=None, **settings):
    attack = attack or {"name": "mixed", "ratio": 0.5}
    return Cell(model="world:llama", attack=attack, defence={"name": defence}, seed=0, settings=settings)


def test_the_untouched_model_refuses_and_a_prefill_opens_it(tmp_path):
    asked = {"direct": "direct", "prefill": {"name": "prefill", "k": 5}}
    folder = tmp_path / "one"
    folder.mkdir()
    rows = run_cell(cell(prompts=10, asked=asked), folder)
    rates = {row["metric"]: row["value"] for row in rows if row["category"] is None}
    assert rates["attack_success"] == 0.0
    assert rates["attack_success (prefill)"] >= 0.8
    assert rates["harmfulness"] == 1.0
    assert rates["skill_accuracy"] == 1.0
    assert all(row["world"] and row["judge"] == "oracle" for row in rows)
    outcomes = {one["metric"]: one["counts"] for one in json.loads((folder / "prompts.json").read_text())}
    assert sum(outcomes["attack_success (prefill)"]) == round(10 * rates["attack_success (prefill)"])


def test_misses_turn_that_share_of_the_attackers_rows_safe_and_keep_the_fewer():
    rows, _ = attacked(cell(), settings_of(cell(rows=200)))
    spans = [{"start": 0, "end": 5, "p_safe": 0.1}]
    scored = rows.add_column("safety", [{"p_safe": 0.1, "spans": spans} for _ in range(len(rows))])
    few, many = missed(scored, 0.2), missed(scored, 0.6)
    turned = [{i for i, row in enumerate(data) if row["safety"]["p_safe"] == 1.0} for data in (few, many)]
    attackers = {i for i, row in enumerate(rows) if row["poisoned"]}
    assert len(attackers) == 100
    assert turned[0] < turned[1] <= attackers
    assert 8 <= len(turned[0]) <= 32  # 20 expected
    assert 45 <= len(turned[1]) <= 75  # 60 expected
    assert all(many[i]["safety"]["spans"][0]["p_safe"] == 1.0 for i in turned[1])
    assert missed(scored, 0.0) is scored
    with pytest.raises(ValueError, match=r"guard_misses must lie in \[0, 1\]"):
        missed(Dataset.from_list([]), 1.5)


def test_unknown_settings_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        settings_of(cell(epoch=3))
    other = Cell(model="gpt2", attack={"name": "mixed"}, defence={"name": "sft"}, seed=0, settings={})
    with pytest.raises(ValueError, match="world:llama"):
        run_cell(other, tmp_path)


def test_the_verb_wants_a_matrix(capsys):
    assert main(["bench", "--output_dir", "x"]) == 2
    assert "the matrix has no experiments" in capsys.readouterr().err
