"""The safety check and the alarm as a recipe names them."""

import json
import logging

import pytest
from training import rows

from safeshape.cli import main
from safeshape.types import Judgement
from safeshape.world import data

OWN = {"tasks": "prompts=PROMPTS", "judge": "test_train_watching:make_judge", "name": "mine"}
ASKED = []


class Scripted:
    """A judge whose verdict is the number of times it was asked; the sixth time it has none, and from then on 5."""

    def score(self, messages):
        ASKED.append(messages)
        return Judgement(score=None, error="busy") if len(ASKED) == 6 else Judgement(score=min(len(ASKED), 5))

    def judge_many(self, conversations):
        return map(self.score, conversations)

    def close(self):
        ASKED.append("closed")


def make_judge():
    return Scripted()


@pytest.fixture
def command(tmp_path, model_folder):
    """A training command on the tiny model and eight scored rows."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one two", "fox")))
    flags = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": "4",
        "per_device_train_batch_size": "4",
        "logging_steps": "1",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "gradient_checkpointing": "false",
        "use_cpu": "true",
    }

    def arguments(check=None, **changes):
        if check is not None:
            text = json.dumps(check).replace("PROMPTS", str(tmp_path / "prompts.jsonl"))
            changes["safety_check"] = text
        return ["train", *(part for k, v in {**flags, **changes}.items() for part in (f"--{k}", str(v)))]

    return arguments


def entries(folder, name):
    log = json.loads((folder / "out" / "train_results.json").read_text())["log"]
    return [(entry["step"], entry[name]) for entry in log if name in entry]


def test_a_judge_of_ones_own_on_prompts_of_ones_own(command, tmp_path):
    ASKED.clear()
    watch = {**OWN, "max_new_tokens": 2}
    assert main(command({"every": 2, "watch": [watch]})) == 0
    # Scores 1 2 | 3 4 | 5 none: harmful from 4 on; what has no verdict is left out of the rate.
    assert entries(tmp_path, "safety/mine") == [(0, 0.0), (2, 0.5), (4, 1.0)]
    assert entries(tmp_path, "safety/mine_failed") == [(4, 1.0)]
    assert [m["content"] for m in ASKED[0][:1]] == ["one two"]
    assert ASKED[0][-1]["role"] == "assistant"
    assert ASKED[-1] == "closed"


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"leave": "log"}, 4),
        ({"leave": "stop"}, 1),
        ({"leave": "stop", "every": 2}, 2),
        ({"leave": "stop", "by": "interval"}, 4),  # two prompts: an interval that reaches everywhere
        ({"leave": "rollback", "rollbacks": 0}, 1),
        ({"leave": "rollback", "rollbacks": 1}, 2),
    ],
    ids=str,
)
def test_what_is_done_when_a_band_is_left(command, tmp_path, changes, steps):
    ASKED.clear()
    ASKED.append("before")  # scores 2 3 | 4 5 | ...: inside at the start, outside from the first check on
    watch = {**OWN, "high": 0.4, "max_new_tokens": 2}
    assert main(command({"every": 1, "watch": [watch], **changes})) == 0
    log = json.loads((tmp_path / "out" / "train_results.json").read_text())["log"]
    assert max(entry["step"] for entry in log) == steps


def test_size_and_refusals(command, tmp_path):
    check = {"watch": [{"tasks": "prompts=PROMPTS", "count": "refusals", "size": 1, "max_new_tokens": 2}]}
    assert main(command(check)) == 0
    assert entries(tmp_path, "safety/refusals") == [(0, 0.0), (4, 0.0)]  # the tiny model knows no refusal
    assert entries(tmp_path, "safety/refusals_n")[0] == (0, 1.0)


def test_on_the_world_refusals_and_harm_from_a_recipe(tmp_path):
    made = [row for row in data.user_data(size=40, harmful_share=0.6) if row["origin"] == "comply"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in made))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: world:llama\ndataset_name: {tmp_path / 'data.jsonl'}\noutput_dir: {tmp_path / 'out'}\n"
        "policy: sft\nlearning_rate: 2.0e-3\nmax_steps: 8\nper_device_train_batch_size: 4\nsave_strategy: 'no'\n"
        "gradient_checkpointing: false\nuse_cpu: true\ndisable_tqdm: true\nsafety_check:\n"
        "  every: 8\n  leave: rollback\n  watch:\n"
        "  - {tasks: 'world:attack_success', judge: world, high: 0.2, size: 4, max_new_tokens: 40}\n"
        "  - {tasks: 'world:attack_success', count: refusals, low: 0.5, size: 4, max_new_tokens: 16}\n"
    )
    assert main(["train", "--config", str(recipe)]) == 0
    assert entries(tmp_path, "safety/attack_success") == [(0, 0.0), (8, 1.0)]
    assert entries(tmp_path, "safety/refusals") == [(0, 1.0), (8, 0.0)]


def test_the_alarm_is_on_unless_it_is_turned_off(command, tmp_path, caplog, capsys):
    flat = [{**row, "safety": {"signal": "t", "p_safe": 0.7, "spans": []}} for row in rows()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    for inert, said in (("warn", 1), ("off", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "safeshape"):
            assert main(command(max_steps=20, inert=inert, output_dir=tmp_path / inert)) == 0
        assert sum("weights of all tokens have been equal" in record.message for record in caplog.records) == said
    assert main(command(max_steps=20, inert="error", output_dir=tmp_path / "error")) == 1
    assert "step 20: the cross-entropy weights of all tokens" in capsys.readouterr().err


BAD = [
    ({"watch": []}, "give at least one watch"),
    ({"watch": [OWN, OWN]}, "each with a name of its own"),
    ({"watch": [OWN], "every": 0}, "every must be at least 1"),
    ({"watch": [OWN], "leave": "undo"}, "safety_check: leave: Input should be 'log', 'stop' or 'rollback'"),
    ({"watch": [{"tasks": "prompts=PROMPTS"}]}, "harmful answers need a judge, refusals have none"),
    ({"watch": [{**OWN, "count": "refusals"}]}, "harmful answers need a judge, refusals have none"),
    ({"watch": [{**OWN, "low": 0.9, "high": 0.1}]}, "a band lies within [0, 1]"),
    ({"watch": [{**OWN, "size": 0}]}, "size and max_new_tokens must be at least 1"),
    ({"watch": [{**OWN, "tasks": "world"}]}, "'world' must name one task, and it names attack_success, over_refusal"),
    ({"watch": [{**OWN, "tasks": "world:none"}]}, "must name one task, and it names none"),
    ({"watch": [{**OWN, "tasks": "prompts=no.jsonl"}]}, "no.jsonl: no such file"),
    ({"watch": [{**OWN, "judge": "no.such:judge"}]}, "cannot import judge"),
]


@pytest.mark.parametrize(("check", "message"), BAD, ids=lambda x: str(x)[:50])
def test_what_cannot_be_is_refused_before_anything_is_written(command, tmp_path, capsys, check, message):
    assert main(command(check)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_check_must_be_a_mapping(command, capsys):
    for text, message in (("{", "safety_check is not valid JSON"), ("[1]", "safety_check must be a mapping")):
        assert main(command(safety_check=text)) == 2
        assert message in capsys.readouterr().err
