"""`safeshape report` as a user runs it: everything written, nothing loaded, bad input refused first."""

import json
import re

import pytest
from report_rows import CATEGORIES, HOSTILE, outcomes, rate, score

from safeshape.cli import main
from safeshape.report import write_results
from safeshape.report.page import side_by_side
from safeshape.report.rows import write_outcomes


@pytest.fixture
def results(tmp_path):
    """Two cells with outcomes, categories, a setting and a hostile name."""
    for place, defence in enumerate(("sft", "star", HOSTILE)):
        folder = tmp_path / "runs" / str(place)
        folder.mkdir(parents=True)
        counts = [index % (place + 1) == 0 for index in range(20)]
        rows = [rate(sum(counts), 20, defence=defence), rate(15, 20, defence=defence, metric="task_accuracy")]
        rows += [score(2.0, category=c, defence=defence) for c in CATEGORIES]
        rows += [rate(k, 20, defence=defence, attack="b", settings={"chunk": c}) for k, c in ((1, 1), (2, 5))]
        write_results(folder / "results.json", rows)
        write_outcomes(folder / "outcomes.json", [outcomes(counts, defence=defence)])
    return tmp_path


def run(results, *more):
    return main(["report", "--results", str(results / "runs"), "--output_dir", str(results / "out"), *more])


def test_a_report_is_written_whole_and_loads_nothing(results, capsys):
    assert run(results, "--baseline", "sft") == 0, capsys.readouterr().err
    out = results / "out"
    for name in ("report.html", "table.md", "table.tex", "table.csv", "report.json"):
        assert (out / name).stat().st_size > 0
    stems = {path.stem for path in (out / "figures").iterdir()}
    assert stems == {"harmfulness_by_category", "attack_success_against_chunk", "attack_success_against_task_accuracy"}
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href|action|data|url)\s*=\s*"(?!data:)', page)
    assert not re.search(r"url\(|@import|<link|<script|<iframe|<object", page)
    assert "default-src 'none'" in page
    assert page.count("<img ") == 3
    assert "McNemar, same prompts" in page
    cells = json.loads((out / "report.json").read_text())["cells"]
    star = next(c for c in cells if (c["defence"], c["metric"], c["attack"]) == ("star", "attack_success", "a"))
    assert star["comparison"]["p_value"] == pytest.approx(2 / 2**10)  # 10 prompts changed, all one way
    assert "star" in capsys.readouterr().out


def test_the_knobs_change_what_is_written(results, capsys):
    assert run(results, "--metrics", "task_accuracy", "--title", "A <b> title") == 0
    page = (results / "out" / "report.html").read_text()
    assert "attack success" not in page
    assert "<title>A &lt;b&gt; title</title>" in page
    assert "*" not in (results / "out" / "table.csv").read_text().replace(HOSTILE, "")
    argv = ["report", "--results", str(results / "runs"), "--output_dir", str(results / "other")]
    assert main([*argv, "--safety", "task_accuracy", "--utility", "attack_success"]) == 0
    assert (results / "other" / "figures" / "task_accuracy_against_attack_success.svg").exists()
    said = capsys.readouterr().out
    assert "Not drawn: task_accuracy against chunk, because a curve of 'task_accuracy' needs at least two" in said


def conversations(path, pairs):
    rows = [{"prompt": p, "completion": a, "success": s} for p, a, s in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_stand_on_the_page_only_when_asked_for_and_escaped(results, capsys):
    one = conversations(results / "one.jsonl", [("p1", f"first {HOSTILE}", True), ("p2", "second", False)])
    two = conversations(results / "two.jsonl", [("p2", "other second", True), ("p1", "other first", False)])
    assert run(results) == 0
    assert "other first" not in (results / "out" / "report.html").read_text()
    argv = ["report", "--results", str(results / "runs"), "--output_dir", str(results / "sides")]
    assert main([*argv, "--answers", f"sft={one}", f"star={two}", "--limit", "1"]) == 0
    page = (results / "sides" / "report.html").read_text()
    assert "1 of 2 prompts" in page
    assert "other first" in page
    assert "other second" not in page
    assert "<script" not in page
    assert page.index("sft (counts)") < page.index("star (does not count)")
    for name in ("table.md", "table.csv", "table.tex", "report.json"):
        assert "other first" not in (results / "sides" / name).read_text()


def test_sides_are_joined_by_their_prompts():
    sides = side_by_side({"a": [{"prompt": "p", "completion": "x"}, {"prompt": "q", "completion": "y"}],
                          "b": [{"prompt": "q", "completion": "z"}]})  # fmt: skip
    assert [(side.prompt, dict(side.answers)) for side in sides] == [("q", {"a": "y", "b": "z"})]
    with pytest.raises(ValueError, match="no prompt has an answer of each of: a, b"):
        side_by_side({"a": [{"prompt": "p", "completion": "x"}], "b": [{"prompt": "q", "completion": "z"}]})
    with pytest.raises(ValueError, match="a: row 0: success must be true or false"):
        side_by_side({"a": [{"prompt": "p", "completion": "x", "success": "no"}]})
    with pytest.raises(ValueError, match="a: row 0: "):
        side_by_side({"a": [{"text": "p"}]})


def test_the_card_goes_into_the_saved_model(results, capsys):
    model = results / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"x")
    assert run(results, "--card_into", str(model), "--card_defence", "star") == 0, capsys.readouterr().err
    found = json.loads((model / "safety.json").read_text())
    assert found["defence"] == "star"
    assert sum(name.startswith("results: ") for name in found["sha256"]) == 3
    assert "Safety card" in (model / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "dpo"], "no row has the baseline 'dpo'"),
        (["--metrics", "speed"], "no row has the metric 'speed'"),
        (["--card_into", "nowhere", "--card_defence", "star"], "card_into nowhere: no such folder"),
        (["--card_into", "."], "give card_into and card_defence together"),
        (["--answers", "file.jsonl"], "answers must be given as NAME=FILE"),
        (["--answers", "a=none.jsonl"], "none.jsonl"),
        (["--limit", "0"], "limit must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(results, capsys, flags, message):
    assert run(results, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (results / "out").exists()


def test_places_that_cannot_be_used(results, capsys, tmp_path):
    (results / "out").mkdir()
    (results / "out" / "mine.txt").touch()
    assert run(results) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["report", "--results", str(tmp_path / "none"), "--output_dir", str(tmp_path / "o")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "results.json").write_text("[]")
    assert main(["report", "--results", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "o")]) == 2
    assert "there are no rows" in capsys.readouterr().err
