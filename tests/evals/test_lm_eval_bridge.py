"""Abilities through lm-evaluation-harness on the world's model, from YAML tasks of our own and without network."""

import json

import pytest

from safeshape.evals.answering import LocalModel, load_model
from safeshape.evals.lm_eval_bridge import _of_task, run_lm_eval, task_manager
from safeshape.evals.metrics import Run
from safeshape.stats import wilson
from safeshape.world import path
from safeshape.world.language import sample

RUN = Run(attack="none", defence="sft", model="m", seed=0)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metadata: {{version: 1}}
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}'
FREE = (
    "generation_kwargs: {until: [], max_gen_toks: 64, do_sample: false}\n"
    "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of skills that the model has, one of them with a wrong answer for every second question; a group."""
    found = tmp_path_factory.mktemp("tasks")
    items = sample("skill", 6, seed=5, held_out=True)
    free = [{"question": one.prompt, "answer": one.answer} for one in items]
    choice = [
        {"question": f"{one.prompt} ", "choices": [one.answer, "zzq zzq"], "answer": n % 2}
        for n, one in enumerate(items)
    ]
    for name, kind, rows, more in (
        ("world_free", "generate_until", free, FREE),
        ("world_choice", "multiple_choice", choice, CHOICE),
    ):
        file = found / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (found / f"{name}.yaml").write_text(TASK.format(name=name, file=file, kind=kind, more=more))
    for copy in ("a", "b"):
        text = TASK.format(name=f"part_{copy}", file=found / "world_choice.jsonl", kind="multiple_choice", more=CHOICE)
        (found / f"part_{copy}.yaml").write_text(text)
    (found / "both.yaml").write_text("group: both\ntask: [part_a, part_b]\n")
    return str(found)


@pytest.fixture(scope="module")
def model():
    loaded, tokenizer = load_model(path("llama"))
    return LocalModel(loaded, tokenizer, name="world:llama", batch_size=4)


def rows_of(results):
    return {(one.row.settings["dataset"], one.row.metric): one.row for one in results}


def test_the_harness_measures_our_model_and_keeps_what_it_gave(model, folder, tmp_path, monkeypatch):
    options = {"keep": tmp_path / "kept.sqlite", "include_path": folder, "chat_template": True, "world": True}
    rows = rows_of(run_lm_eval(model, ["world_free", "world_choice"], RUN, **options))
    free, choice = rows["lm_eval:world_free", "exact_match"], rows["lm_eval:world_choice", "acc"]
    assert (free.value, free.n) == (1.0, 6)
    assert (choice.value, choice.n) == (0.5, 6)
    assert (choice.low, choice.high) == wilson(3, 6)
    assert (choice.judge, choice.world, choice.defence) == ("lm_eval", True, "sft")
    # What was answered is not asked for again, and another model finds nothing of it.
    (kept,) = tmp_path.glob("kept.sqlite.lm_eval-*")
    before = kept.name

    def never(*args, **kwargs):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(model.model, "generate", never)
    monkeypatch.setattr(model.model, "forward", never)
    again = rows_of(run_lm_eval(model, ["world_free", "world_choice"], RUN, **options))
    assert again == rows
    assert [file.name for file in tmp_path.glob("kept.sqlite.lm_eval-*")] == [before]


def test_without_the_chat_template_the_model_is_worse(model, folder):
    (row,) = run_lm_eval(model, ["world_free"], RUN, include_path=folder, limit=4)
    assert (row.row.n, row.row.world) == (4, False)
    assert row.row.value < 1.0


def test_examples_make_prompts_longer(model, folder, monkeypatch):
    lengths, real = [], model.model.generate
    monkeypatch.setattr(
        model.model, "generate", lambda input_ids, **more: lengths.append(input_ids.shape[1]) or real(input_ids, **more)
    )
    for shots in (0, 2):
        run_lm_eval(model, ["world_free"], RUN, include_path=folder, limit=1, num_fewshot=shots)
    assert lengths[1] > 2 * lengths[0]


def test_a_group_has_a_row_over_all_its_questions(model, folder):
    rows = rows_of(run_lm_eval(model, ["both"], RUN, include_path=folder, limit=3, chat_template=True))
    assert {name: row.n for (name, _), row in rows.items()} == {
        "lm_eval:part_a": 3,
        "lm_eval:part_b": 3,
        "lm_eval:both": 6,
    }
    assert rows["lm_eval:both", "acc"].value == pytest.approx(2 / 3)


def test_means_have_bootstrap_intervals_and_one_question_none():
    samples = [{"filter": "none", "metrics": ["f1", "bleu"], "f1": value, "bleu": ["a"]} for value in (0.1, 0.5, 0.9)]
    (found,) = _of_task("t", samples, RUN, False)
    assert found.row.metric == "f1"  # a corpus metric has no number for a question
    assert found.row.low < found.row.value == pytest.approx(0.5)
    assert found.row.high > 0.5
    with pytest.raises(ValueError, match="lm_eval:t: f1 is a mean over one question"):
        _of_task("t", samples[:1], RUN, False)


def test_unknown_tasks_are_named(folder):
    with pytest.raises(ValueError, match="lm-evaluation-harness has no task 'nothing' in "):
        task_manager(["nothing"], folder)
    with pytest.raises(ValueError, match="is no folder"):
        task_manager(["world_free"], f"{folder}/nowhere")
