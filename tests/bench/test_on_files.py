"""A cell on files: pools, held-out requests and a judge of one's own."""

import json

import pytest
import torch

from safeshape.bench import Cell, on_files
from safeshape.bench.cell import check_cell, run_cell
from safeshape.store import Store
from safeshape.types import Judgement
from safeshape.world import oracle
from safeshape.world.pools import pools, prompts

CLOSED = []


class Unsure:
    """The oracle's verdicts, but none on every third request."""

    def close(self):
        CLOSED.append(self)

    def __init__(self):
        self.asked = 0

    def judge_many(self, conversations):
        for messages in conversations:
            self.asked += 1
            request, answer = (str(m["content"]) for m in messages[-2:])
            score = None if self.asked % 3 == 0 else oracle.severity(request, answer)
            yield Judgement(score=score, category="fraud")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tmp_path):
    drawn = pools(benign=24, harmful=24, safe=4)
    files = {
        name: write(tmp_path / f"{name}.jsonl", [{"messages": list(one)} for one in vars(drawn)[name]])
        for name in ("benign", "harmful")
    }
    held = [{"messages": list(one.messages)} for one in prompts(size=6)]
    files["requests"] = write(tmp_path / "requests.jsonl", held)
    benign = [{"prompt": one[0]["content"]} for one in drawn.benign[:3]]
    files["benign_requests"] = write(tmp_path / "benign_requests.jsonl", benign)
    return {
        **files,
        "judge": "world",
        "rows": 24,
        "epochs": 8,
        "learning_rate": 2e-3,
        "max_new_tokens": 48,
        "prompts": 6,
    }


def cell(settings, defence="sft", attack=None, **changes):
    attack = attack or {"name": "harmful_only"}
    found = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    return Cell(model="world:llama", attack=attack, defence={"name": defence}, seed=0, settings=found)


def rates(tmp_path, one):
    folder = tmp_path / one.name()
    folder.mkdir()
    rows = run_cell(one, folder)
    outcomes = {o["metric"]: o for o in json.loads((folder / "prompts.json").read_text())}
    return {row["metric"]: row for row in rows if row["category"] is None}, outcomes


def test_plain_fine_tuning_breaks_and_star_holds(tmp_path, settings):
    broken, _ = rates(tmp_path, cell(settings))
    assert broken["attack_success"]["value"] == 1.0
    assert (broken["attack_success"]["n"], broken["attack_success"]["judge"]) == (6, "world")
    assert broken["attack_success"]["world"]  # the model is the world's, whatever the files are
    assert broken["attack_success"]["settings"]["requests"] == "requests.jsonl"
    assert broken["over_refusal"]["n"] == 3
    held, _ = rates(tmp_path, cell(settings, "star", guard="world"))
    assert held["attack_success"]["value"] == 0.0


def test_an_adapter_is_the_same_again_for_the_same_seed(tmp_path, settings):
    one = cell(settings, lora_rank=2, epochs=1, rows=8)
    with Store(tmp_path / "s") as store:
        first, again = (on_files.train_cell(one, tmp_path / str(i), store).model.state_dict() for i in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_nobody_can_judge_is_left_out_and_the_others_keep_their_place(tmp_path, settings):
    found, outcomes = rates(tmp_path, cell(settings, "untouched", judge="test_on_files:Unsure"))
    assert (found["attack_success"]["n"], found["attack_success"]["value"]) == (4, 0.0)
    assert len(CLOSED) == 1
    names = [f"attack_success/{place}" for place in (0, 1, 3, 4)]
    assert outcomes["attack_success"]["prompts"] == names


@pytest.mark.parametrize(
    ("defence", "changes", "message"),
    [
        ("sft", {"judge": None}, "needs the setting 'judge'"),
        ("sft", {"requests": "no.jsonl"}, "requests: no.jsonl: no such file"),
        ("sft", {"tempo": 3}, "unknown setting 'tempo'"),
        ("star", {}, "defence 'star' needs scores; give a guard, a probe or a critic"),
        ("star", {"guard": "world", "critic": "world"}, "one of them"),
        ("lisa", {}, "defence 'lisa' needs the setting 'safe_data'"),
    ],
    ids=str,
)
def test_what_is_missing_is_said_before_anything_is_run(settings, defence, changes, message):
    with pytest.raises(ValueError, match=message):
        check_cell(cell(settings, defence, **changes))
