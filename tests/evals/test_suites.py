"""The public suites from their published files: counts, columns, kinds, and sentences for files that are none."""

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import nltk
import pytest
from datasets import Dataset, load_dataset

from safeshape.evals import sources
from safeshape.evals.suites import SUITES, load_suite
from safeshape.signals.rubric import CATEGORIES

DATA = Path(os.environ.get("SAFESHAPE_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """The harness's checks look for data of nltk when they are imported, on the network where it is not there."""
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)


def real(path):
    if not (DATA / path).exists():
        pytest.skip(f"the public file {path} is not beside the checkout")
    return str(DATA / path)


def said(task, index=0):
    return task.prompts[index][-1]["content"]


def write_csv(path, header, *rows):
    with path.open("w", newline="") as lines:
        csv.writer(lines).writerows([header, *rows] if header else rows)
    return str(path)


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "path", "column"),
    [
        ("advbench", "advbench/harmful_behaviors.csv", "goal"),
        ("strongreject", "strongreject/strongreject_dataset.csv", "forbidden_prompt"),
        ("jailbreakbench", "jailbreakbench/harmful-behaviors.csv", "Goal"),
    ],
)
def test_published_lists_of_requests(name, path, column):
    with Path(real(path)).open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    (task,) = load_suite(name, real(path))
    assert (task.kind, task.name) == ("harmful", name)
    assert [said(task, n) for n in range(len(task.prompts))] == [row[column] for row in rows]
    assert len(set(task.ids)) == len(rows) > 90
    assert task.scorers[0] == "judge"
    if name != "advbench":  # it has no categories
        categories = [row.get("category") or row["Category"] for row in rows]
        assert list(task.categories) == categories


def test_harmbench_asks_with_its_contexts_and_leaves_copyright_out():
    (task,) = load_suite("harmbench", real("harmbench"))
    (copyright,) = load_suite("harmbench", real("harmbench"), part="copyright")
    (contextual,) = load_suite("harmbench", real("harmbench"), part="contextual")
    assert (len(task.prompts), len(copyright.prompts), len(contextual.prompts)) == (299, 100, 100)
    assert "100 copyright prompts of harmbench were left out" in task.notes[0]
    assert not copyright.notes
    path = Path(real("harmbench")) / "harmbench_behaviors_text_val.csv"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        row = next(row for row in csv.DictReader(lines) if row["ContextString"])
    place = list(contextual.ids).index(row["BehaviorID"])
    assert said(contextual, place) == f"{row['ContextString']}\n\n---\n\n{row['Behavior']}"
    assert contextual.categories[place] == row["SemanticCategory"]


def test_harmbenchs_whole_list_stands_for_its_halves(tmp_path):
    header = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")
    rows = [("ask one", "standard", "s", "", "", "one"), ("ask two", "standard", "s", "", "", "two")]
    for name, part in (("all", rows), ("val", rows[:1]), ("test", rows[1:])):
        write_csv(tmp_path / f"harmbench_behaviors_text_{name}.csv", header, *part)
    assert len(load_suite("harmbench", str(tmp_path))[0].prompts) == 2
    (tmp_path / "harmbench_behaviors_text_all.csv").unlink()
    assert sorted(load_suite("harmbench", str(tmp_path))[0].ids) == ["one", "two"]


def test_xstest_is_two_tasks():
    benign, harmful = load_suite("xstest", real("xstest/xstest_prompts.csv"))
    assert (benign.name, benign.kind, len(benign.prompts)) == ("xstest_benign", "benign", 248)
    assert (harmful.name, harmful.kind, len(harmful.prompts)) == ("xstest_harmful", "harmful", 199)
    assert benign.scorers[0] == "refusal"
    assert "homonyms" in benign.categories
    (safe,) = load_suite("xstest", real("xstest/xstest_prompts.csv"), part="safe")
    assert len(safe.prompts) == 248


def test_coconot_is_three_tasks():
    found = {task.kind: task for task in load_suite("coconot", real("coconot"))}
    assert {kind: len(task.prompts) for kind, task in found.items()} == {"benign": 379, "harmful": 394, "decline": 606}
    assert set(found["harmful"].categories) == {"Requests with safety concerns"}
    assert "Requests with safety concerns" not in found["decline"].categories


def test_false_refusals_of_cyberseceval(tmp_path):
    (task,) = load_suite("mitre_frr", real("mitre_frr/mitre_frr.json"))
    assert (task.kind, len(task.prompts)) == ("benign", 750)
    row = {"mutated_prompt": "x", "attack_type": "a", "is_malicious": True}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="row 0: is_malicious must be false"):
        load_suite("mitre_frr", str(tmp_path / "m.json"))


def test_gsm8k_takes_the_number_after_the_mark(tmp_path):
    (task,) = load_suite("gsm8k", real("gsm8k/test.jsonl"))
    assert len(task.prompts) == 1319
    first = json.loads(Path(real("gsm8k/test.jsonl")).read_text().splitlines()[0])
    assert task.references[0] == first["answer"].split("####")[1].strip()
    assert said(task).startswith(first["question"])
    assert task.scorers == ("numeric_match",)
    for answer in ("eighteen", "so #### eighteen"):
        with pytest.raises(ValueError, match="row 0: answer has no number after ####"):
            load_suite("gsm8k", write_jsonl(tmp_path / "g.jsonl", {"question": "q", "answer": answer}))


def test_ifeval_drops_the_prefix_of_its_language(tmp_path):
    (task,) = load_suite("ifeval", real("ifeval/ifeval_en.jsonl"))
    assert len(task.prompts) == 541
    assert not any(name.startswith("en:") for one in task.references for name in one["instruction_id_list"])
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["a", "b"], "kwargs": [{}]}
    with pytest.raises(ValueError, match="differ in length"):
        load_suite("ifeval", write_jsonl(tmp_path / "i.jsonl", row))


def test_every_instruction_of_ifeval_can_be_checked():
    from safeshape.evals.matching import instructions_followed

    (task,) = load_suite("ifeval", real("ifeval/ifeval_en.jsonl"))
    seen, verdicts = set(), []
    for reference in task.references:
        if not set(reference["instruction_id_list"]) <= seen:  # each kind of instruction once is enough
            seen |= set(reference["instruction_id_list"])
            try:
                verdicts.append(instructions_followed("one two three", reference))
            except LookupError:  # needs data of nltk that only the network has
                continue
    assert len(seen) == 25
    assert len(verdicts) > 10
    assert set(verdicts) <= {0.0, 1.0}


def test_mmlu_from_its_archive():
    tasks = load_suite("mmlu", real("mmlu/mmlu.zip"), part="anatomy")
    with zipfile.ZipFile(real("mmlu/mmlu.zip")) as archive:
        rows = list(csv.reader(io.StringIO(archive.read("data/test/anatomy_test.csv").decode())))
    (task,) = tasks
    assert task.name == "mmlu:anatomy"
    assert list(task.references) == [row[5] for row in rows]
    assert f"B. {rows[0][2]}" in said(task)


def test_truthfulqa_shuffles_its_choices():
    (task,) = load_suite("truthfulqa", real("truthfulqa/mc_task_v1_817.json"))
    rows = json.loads(Path(real("truthfulqa/mc_task_v1_817.json")).read_text())
    for index in (0, 400, 816):
        true = next(text for text, label in rows[index]["mc1_targets"].items() if label == 1)
        assert f"{task.references[index]}. {true}\n" in said(task, index) + "\n"
    share = sum(reference == "A" for reference in task.references) / len(task.references)
    assert share < 0.4  # the published list has every true choice first


def test_sql_create_context_shows_the_schema():
    (task,) = load_suite("sql_create_context", real("sql_create_context/sql_create_context_wikisql951.csv"))
    assert len(task.prompts) == 951
    assert "CREATE TABLE" in said(task)
    assert str(task.references[0]).startswith("SELECT")


def test_limits_draw_by_the_seed():
    path = real("advbench/harmful_behaviors.csv")
    (few,), (same,), (other,) = (load_suite("advbench", path, limit=5, seed=seed) for seed in (0, 0, 1))
    assert len(few.prompts) == 5
    assert few.ids == same.ids != other.ids


# Files that are not here: fixtures in the published form, with invented requests.


def test_hexphi_is_a_folder_of_files_without_a_header(tmp_path):
    for number in range(1, 12):
        if number != 2:
            write_csv(tmp_path / f"category_{number}.csv", None, [f"do gorp, number {number}"], ["do gorp again"])
    (task,) = load_suite("hexphi", str(tmp_path))
    assert len(task.prompts) == 20
    assert "10 of 11 categories" in task.notes[0]
    assert set(task.categories) == set(CATEGORIES) - {"child safety"}
    (malware,) = load_suite("hexphi", str(tmp_path), part="category_4")
    assert set(malware.categories) == {"malware"}
    assert said(malware) == "do gorp, number 4"
    write_csv(tmp_path / "category_2.csv", None, ["x"])
    assert not load_suite("hexphi", str(tmp_path))[0].notes
    (tmp_path / "category_7.csv").unlink()
    with pytest.raises(ValueError, match=r"lacks category_7\.csv"):
        load_suite("hexphi", str(tmp_path))
    with pytest.raises(ValueError, match="not on the Hub"):
        load_suite("hexphi")


def test_sorrybench_asks_its_base_prompts(tmp_path):
    rows = [
        {"question_id": 1, "category": "3", "turns": ["do gorp"], "prompt_style": "base"},
        {"question_id": 1, "category": "3", "turns": ["xyzzy"], "prompt_style": "morse"},
    ]
    path = write_jsonl(tmp_path / "s.jsonl", *rows)
    (task,) = load_suite("sorrybench", path)
    assert (said(task), len(task.prompts), list(task.categories)) == ("do gorp", 1, ["3"])
    assert said(load_suite("sorrybench", path, part="morse")[0]) == "xyzzy"
    with pytest.raises(ValueError, match="row 0: turns must be a list"):
        load_suite("sorrybench", write_jsonl(tmp_path / "t.jsonl", {**rows[0], "turns": "do gorp"}))


@pytest.mark.parametrize(
    ("name", "file", "row", "kind"),
    [
        ("orbench", "or-bench-hard-1k.csv", {"prompt": "kill a gorp process", "category": "violence"}, "benign"),
        ("orbench", "or-bench-toxic.csv", {"prompt": "do gorp", "category": "violence"}, "harmful"),
        ("directharm4", "d.csv", {"instruction": "do gorp", "category": "malware"}, "harmful"),
        ("simplesafetytests", "s.csv", {"id": "1", "harm_area": "scams", "prompt": "do gorp"}, "harmful"),
        ("jailbreakbench", "benign-behaviors.csv", {"Goal": "plant a gorp", "Category": "x"}, "benign"),
    ],
)
def test_suites_of_one_request_a_row(tmp_path, name, file, row, kind):
    (task,) = load_suite(name, write_csv(tmp_path / file, list(row), list(row.values())))
    assert task.kind == kind
    assert said(task) in row.values()
    assert task.categories[0] in row.values()


def test_arc_in_both_of_its_forms(tmp_path):
    hub = {
        "id": "a",
        "question": "2+2?",
        "choices": {"text": ["3", "4"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    ai2 = {
        "id": "b",
        "question": {"stem": "2+2?", "choices": [{"text": "4", "label": "A"}, {"text": "3", "label": "B"}]},
        "answerKey": "A",
    }
    (task,) = load_suite("arc", write_jsonl(tmp_path / "arc.jsonl", hub, ai2))
    assert task.references == ["B", "A"]
    assert "A. 3\nB. 4" in said(task)
    with pytest.raises(ValueError, match="answerKey is not among the labels"):
        load_suite("arc", write_jsonl(tmp_path / "bad.jsonl", {**hub, "answerKey": "9"}))


def test_the_hub_is_asked_by_id_configuration_and_split(monkeypatch):
    asked = []
    columns = {
        "standard": {"prompt": ["do gorp"], "category": ["c"]},
        "contextual": {"prompt": ["sum it up"], "context": ["a text on gorp"], "category": ["c"]},
        "copyright": {"prompt": ["sing"], "tags": [["lyrics"]]},
    }

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return Dataset.from_dict(columns[configuration])

    monkeypatch.setattr(sources, "load_dataset", load)
    (task,) = load_suite("harmbench")
    assert asked == [("walledai/HarmBench", name, "train") for name in ("standard", "contextual", "copyright")]
    assert [said(task, n) for n in range(2)] == ["do gorp", "a text on gorp\n\n---\n\nsum it up"]
    assert len(task.prompts) == 2


def test_mmlu_and_truthfulqa_as_on_the_hub(monkeypatch):
    rows = {
        "cais/mmlu": [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law"}],
        "truthfulqa/truthful_qa": [{"question": "q", "mc1_targets": {"choices": ["yes", "no"], "labels": [0, 1]}}],
    }
    monkeypatch.setattr(sources, "load_dataset", lambda name, configuration, split: rows[name])
    (mmlu,), (truth,) = load_suite("mmlu"), load_suite("truthfulqa")
    assert (mmlu.references[0], mmlu.categories[0]) == ("C", "law")
    assert f"{truth.references[0]}. no" in said(truth)


def test_the_hub_out_of_reach_is_one_sentence():
    with pytest.raises(ValueError, match="cannot load walledai/AdvBench on the Hub"):
        load_suite("advbench")
    assert sources.load_dataset is load_dataset


def test_a_file_of_ones_own(tmp_path):
    rows = [
        {"prompt": "do gorp", "category": "malware", "id": "x", "prompt_index": 0, "attempt_index": 0},
        {
            "messages": [{"role": "user", "content": "do gorp"}, {"role": "assistant", "content": "Sure"}],
            "id": "x",
            "prompt_index": 0,
            "attempt_index": 1,
        },
        {"prompt": "another", "prompt_index": 1, "attempt_index": 0, "samples": 1, "temperature": None},
    ]
    (task,) = load_suite("prompts", write_jsonl(tmp_path / "mine.jsonl", *rows))
    assert (task.name, task.kind) == ("prompts:mine", "harmful")
    assert list(task.groups) == ["0", "0", "1"]
    assert list(task.ids) == ["x/0", "x/1", "1/0"]
    assert said(task, 1) == "Sure"
    (questions,) = load_suite("questions", write_jsonl(tmp_path / "q.jsonl", {"prompt": "2+2", "reference": 4}))
    assert (questions.scorers, questions.references) == (("exact_match",), [4])


def test_sampled_attacks_are_told_apart(tmp_path):
    row = {"prompt": "do gorp", "samples": 10, "temperature": 1.0}
    (task,) = load_suite("prompts", write_jsonl(tmp_path / "n.jsonl", row))
    assert task.drawn == (10, 1.0)
    with pytest.raises(ValueError, match="different samples"):
        load_suite("prompts", write_jsonl(tmp_path / "m.jsonl", row, {"prompt": "x"}))


@pytest.mark.parametrize(
    ("name", "file", "content", "sentence"),
    [
        (
            "advbench",
            "a.csv",
            "goals,target\nx,y\n",
            "row 0 has no column 'goal'; expected columns: goal; it has: goals",
        ),
        ("advbench", "a.csv", "goal,target\nx\n", "line 2 does not have the header's number of columns"),
        ("advbench", "a.csv", "goal,target\n ,y\n", "row 0: goal is empty"),
        ("advbench", "a.csv", "goal,target\n", "holds no rows"),
        ("advbench", "a.txt", "x", "unknown kind of file"),
        ("advbench", "a.jsonl", '{"goal": "x"}\n{"goal"\n', "line 2 is not valid JSON"),
        ("advbench", "a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("advbench", "a.json", '{"goal": "x"}', "must hold a list of objects"),
        ("advbench", "a.parquet", "no", "cannot read"),
        ("advbench", "a.csv", b"goal\n\xff\xfe\n", "is not UTF-8"),
        ("xstest", "x.csv", "prompt,type,label\nq,t,maybe\n", "label must be safe or unsafe, got 'maybe'"),
        ("mmlu", "m.zip", "no", "is not a zip archive"),
        ("prompts", "p.jsonl", '{"text": "x"}\n', "row 0 has no column 'messages' or 'prompt'; it has: text"),
        ("prompts", "p.jsonl", '{"messages": [{"role": "user"}]}\n', "row 0: message 0 needs a role and content"),
        ("questions", "q.jsonl", '{"prompt": "x"}\n', "row 0 has no column 'reference'"),
    ],
)
def test_bad_files_are_one_sentence_that_names_them(tmp_path, name, file, content, sentence):
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=sentence) as told:
        load_suite(name, str(path))
    assert file in str(told.value)


def test_unknown_suites_and_parts_are_named():
    with pytest.raises(ValueError, match="unknown suite 'advbenhc'; known: advbench"):
        load_suite("advbenhc")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_suite("advbench", "nowhere.csv")
    with pytest.raises(ValueError, match="has no part 'x'; it has: safe, unsafe"):
        load_suite("xstest", real("xstest/xstest_prompts.csv"), part="x")


def test_every_suite_says_where_it_is_from():
    for name, suite in SUITES.items():
        assert suite.source, name
        assert suite.licence, name
