"""`safeshape defences` as a user meets it."""

import json

import pytest
import torch

from safeshape.cli import main
from safeshape.defences import DEFENCES
from safeshape.world import oracle
from safeshape.world.alignment import harmful_data, safe_data, scored
from safeshape.world.data import user_data


def test_the_list_shows_every_defence_with_cost_needs_and_source(tmp_path, capsys):
    assert main(["defences", "list", "--output", str(tmp_path / "table.json")]) == 0
    shown = capsys.readouterr().out
    table = {row["name"]: row for row in json.loads((tmp_path / "table.json").read_text())["defences"]}
    assert list(table) == list(DEFENCES)
    assert all(f"\n{name} " in shown for name in DEFENCES)
    assert table["sft"]["per_step"] == pytest.approx(1.0, abs=0.25)
    assert table["booster"]["per_step"] > 2
    assert table["safe_delta"]["once"] > 0
    assert table["star"]["needs"] == "guard"
    assert table["safe_merge"]["needs"] == "base model, safe data"
    assert table["ptst"]["needs"] == "nothing"
    assert "embedded world" in shown
    assert "Differs: " in shown


def test_costs_are_read_from_the_file_that_is_given(tmp_path, capsys):
    path = tmp_path / "costs.json"
    facts = {"date": "2000-01-01", "device": "abacus", "steps": 3}
    path.write_text(json.dumps({**facts, "costs": {"lisa": {"per_step": 7.25, "once": 0}}}))
    assert main(["defences", "--costs", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "7.25x" in shown
    assert "2000-01-01, abacus, 3 updates a run" in shown
    costs = [line.split()[2] for line in shown.splitlines() if line.split() and line.split()[0] in DEFENCES]
    assert len(costs) == len(DEFENCES)
    assert costs.count("-") == len(DEFENCES) - 1


@pytest.mark.slow
def test_measuring_writes_what_the_list_reads(tmp_path, capsys):
    path = tmp_path / "costs.json"
    flags = [
        "--steps",
        "3",
        "--batch_size",
        "2",
        "--repeats",
        "1",
        "--only",
        "sft",
        "safe_grad",
        "vaccine",
        "safe_merge",
    ]
    assert main(["defences", "measure", "--output", str(path), *flags]) == 0
    found = json.loads(path.read_text())
    assert set(found["costs"]) == {"sft", "safe_grad", "vaccine", "safe_merge"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"].startswith("CPU ") or torch.cuda.is_available()
    assert found["world"] is True
    assert found["costs"]["safe_grad"]["per_step"] > found["costs"]["sft"]["per_step"]
    assert found["costs"]["safe_merge"]["once"] > 1  # it trains the start again, on the safe data
    assert main(["defences", "--costs", str(path)]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["measure"], "output must be given to measure"),
        (["measure", "--output", "{}/no/x.json"], "does not exist"),
        (["measure", "--output", "{}/x.json", "--only", "lissa"], "unknown defence 'lissa'"),
        (["measure", "--output", "{}/x.json", "--steps", "1"], "steps must be at least 2"),
        (["measure", "--output", "{}/x.json", "--repeats", "0"], "repeats must be at least 1"),
        (["measure", "--output", "{}/x.json", "--batch_size", "0"], "batch_size must be at least 1"),
        (["measure", "--output", "{}/x.json", "--costs", "y"], "costs is for list"),
        (["--costs", "{}/none.json"], "cannot read costs from"),
        (["forget"], "invalid choice: 'forget'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, flags, message):
    assert main(["defences", *(flag.format(tmp_path) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_providers_data_are_what_they_say():
    safe, harmful = safe_data(size=40), harmful_data(size=20)
    answers = [row["messages"][1]["content"] for row in safe]
    assert sum(oracle.refused(answer) for answer in answers) == 20
    assert not any(oracle.harmful(answer) for answer in answers)
    assert all(oracle.harmful(row["messages"][1]["content"]) for row in harmful)
    assert safe_data(size=40, seed=1)["messages"] != safe["messages"]
    marked = scored(user_data(size=40, harmful_share=0.25))
    assert sum(row["safety"]["p_safe"] == 0 for row in marked) == 10
