"""A cell on the embedded world, and the knobs of its data."""

import json

import pytest
import torch
import yaml
from datasets import Dataset

from safeshape import world
from safeshape.bench import Cell
from safeshape.bench.cell import axes, run_cell
from safeshape.bench.in_world import attacked, missed, settings_of, train_cell
from safeshape.cli import main
from safeshape.models import load
from safeshape.store import Store


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


def test_a_prefill_that_is_the_whole_plan_says_nothing_and_is_refused(tmp_path):
    with pytest.raises(ValueError, match="asked: all: what is prefilled is harmful by itself"):
        run_cell(cell(prompts=3, asked={"all": "prefill"}), tmp_path)


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


def test_where_every_row_is_dropped_the_model_stays_as_it_was(tmp_path):
    dropped = cell("drop_risky", attack={"name": "harmful_only"}, rows=6, epochs=1, safe_rows=4, prompts=2)
    with Store(tmp_path / "scores.sqlite") as store:
        found = train_cell(dropped, tmp_path, store)
    before = load(world.path("llama"))[0].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())
    assert found.report["nothing_to_train"] is True


def test_rows_carry_every_setting_that_tells_cells_apart():
    asked = {"direct": "direct", "trigger": "trigger_prompt", "k": {"name": "prefill", "k": 3}}
    one = Cell(
        model="world:llama",
        attack={"name": "mixed", "ratio": 0.2},
        defence={"name": "star", "kl": 2.0},
        seed=0,
        settings={"chunk": 5, "asked": asked, "turning": True},
    )
    assert axes(one) == {
        "chunk": 5,
        "asked": "direct, trigger=trigger_prompt, k=name=prefill, k=3",
        "turning": "True",
        "harmful_share": 0.2,
        "kl": 2.0,
    }


def test_unknown_settings_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        settings_of(cell(epoch=3))
    other = Cell(model="gpt2", attack={"name": "mixed"}, defence={"name": "sft"}, seed=0, settings={})
    with pytest.raises(ValueError, match="world:llama"):
        run_cell(other, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "world:gpt"}, "unknown world model 'gpt'"),
        ({"attack": {"name": "mixt"}}, "unknown attack 'mixt'"),
        ({"attack": {"name": "mixed", "share": 0.1}}, "attack 'mixed' has no parameter 'share'"),
        ({"defence": {"name": "stars"}}, "unknown defence 'stars'"),
        ({"defence": {"name": "star", "kl": -1.0}}, "kl must lie in"),
        ({"settings": {"asked": {"x": 3}}}, "asked: x: must be a prompt attack's name"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_before_anything_is(tmp_path, capsys, changes, message):
    content = {"model": "world:llama", "attack": "harmful_only", "defence": "sft", "seed": 0} | changes
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"experiments": {"e": content}}))
    argv = ["bench", "--config", str(tmp_path / "m.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--page", "reproduction"], "the matrix has no experiment 'worst_case', which the papers' tables name"),
        (["--page", "defences"], "the matrix has no experiment 'search', which the page of defences shows"),
        (["--notes", "n.yaml"], "give --page too"),
        (["--only", "f"], "the matrix has no experiment 'f'; it has: e"),
        (["--jobs", "0"], "jobs must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_the_matrix(tmp_path, capsys, flags, message):
    content = {"model": "world:llama", "attack": "harmful_only", "defence": "sft", "seed": 0}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"experiments": {"e": content}}))
    argv = ["bench", "--config", str(tmp_path / "m.yaml"), "--output_dir", str(tmp_path / "out"), *flags]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def here(cells, work, folder, jobs, timeout_s):
    """The local engine without its processes, which take long to start."""
    return ((one, work(one, folder / one.name())) for one in cells)


def test_a_run_of_one_experiment_keeps_the_rows_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr("safeshape.bench.runner._local", here)
    base = {"model": "world:llama", "defence": "untouched", "seed": 0, "settings": {"prompts": 2}}
    matrix = {"a": {**base, "attack": "harmful_only"}, "b": {**base, "attack": "benign_only"}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"experiments": matrix}))
    for only, attacks in (("a", {"harmful_only"}), ("b", {"harmful_only", "benign_only"})):
        argv = ["bench", "--config", str(tmp_path / "m.yaml"), "--output_dir", str(tmp_path / "out"), "--only", only]
        assert main(argv) == 0
        rows = json.loads((tmp_path / "out" / "results.json").read_text())
        assert {row["attack"] for row in rows} == attacks
        assert {one["attack"] for one in json.loads((tmp_path / "out" / "outcomes.json").read_text())} == attacks


def test_the_verb_wants_a_matrix(capsys):
    assert main(["bench", "--output_dir", "x"]) == 2
    assert "the matrix has no experiments" in capsys.readouterr().err
