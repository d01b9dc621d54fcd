"""`safeshape score antibody`: scores of a model alone, for training and in a bench cell."""

import json

import pytest
from conftest import conversation

from safeshape.bench.in_world import settings_of, train_cell
from safeshape.bench.matrix import Cell
from safeshape.cli import main
from safeshape.models import load
from safeshape.signals.antibody import AntibodySignal
from safeshape.store import Store

TALKS = [conversation("one two", "fox dog cat"), conversation("three", "no no"), conversation("dog", "safe")]


def write(path, talks):
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(path)


def command(tmp_path, model_folder, *more, talks=TALKS):
    data = write(tmp_path / "rows.jsonl", talks)
    return ["score", "antibody", "--dataset_name", data, "--model_name_or_path", str(model_folder),
            "--output", str(tmp_path / "scored.jsonl"), "--refusal", "no no", *more]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_column_has_the_signals_scores_and_a_second_run_takes_them_from_the_store(tmp_path, model_folder, capsys):
    assert main(command(tmp_path, model_folder, "--tau", "2.0")) == 0
    assert "scored 3 rows (3 now, 0 from the store)" in capsys.readouterr().out
    found = [row["safety"] for row in read(tmp_path / "scored.jsonl")]
    model, tokenizer = load(str(model_folder))
    own = AntibodySignal(model, tokenizer, refusal="no no", tau=2.0).score_many(TALKS)
    assert [entry["p_safe"] for entry in found] == pytest.approx([score.p_safe for score in own], rel=1e-5)
    assert found[1]["p_safe"] == pytest.approx(0.5, abs=1e-6)  # the answer is the refusal
    assert found[0]["signal"] == "antibody"
    assert found[0]["scorer"]["tau"] == 2.0
    (tmp_path / "scored.jsonl").unlink()
    assert main(command(tmp_path, model_folder, "--tau", "2.0")) == 0
    assert "(0 now, 3 from the store)" in capsys.readouterr().out


def test_a_row_that_fails_stops_or_is_kept(tmp_path, model_folder, capsys):
    talks = [TALKS[0], TALKS[1][:1]]
    assert main(command(tmp_path, model_folder, talks=talks)) == 2
    assert "the last message must be the assistant's" in capsys.readouterr().err
    assert main(command(tmp_path, model_folder, "--on_error", "keep", talks=talks)) == 0
    kept = read(tmp_path / "scored.jsonl")[1]["safety"]
    assert kept["p_safe"] is None
    assert kept["signal"] == "antibody"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tau", "0"], "tau must be above 0"),
        (["--refusal", " "], "refusal must be a text"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--model_name_or_path", "world:gpt"], "unknown world model 'gpt'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, model_folder, capsys, flags, message):
    assert main(command(tmp_path, model_folder, *flags)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "scored.jsonl").exists()


def test_it_is_a_signal_of_a_bench_cell(tmp_path):
    settings = {"rows": 8, "epochs": 1, "batch_size": 4, "safe_rows": 4, "prompts": 2, "signal": "antibody"}
    cell = Cell(model="world:llama", attack={"name": "mixed", "ratio": 0.5}, defence={"name": "soft_weight"}, seed=0,
                settings=settings)  # fmt: skip
    assert settings_of(cell)["signal"] == "antibody"
    with Store(tmp_path / "scores.sqlite") as store:
        train_cell(cell, tmp_path, store)
        assert store.count("scores") == 8
