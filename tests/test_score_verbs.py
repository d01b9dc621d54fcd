"""`safeshape score calibrate`, `view` and `export` from files to files."""

import json

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from scipy.special import expit

from safeshape.signals.calibration import Calibration, calibrated
from safeshape.signals.scored import scored
from safeshape.sources import read_dataset
from safeshape.types import Score
from safeshape.verbs.score_calibrate import main as calibrate
from safeshape.verbs.score_export import main as export
from safeshape.verbs.score_view import main as view

SCORER = {"guard": "g", "model": "m", "revision": "main", "chunk": 1, "unit": "words"}
WORDS = "one two three"
ENDS = (3, 7, 13)


def safety(*values, scorer=SCORER, error=None):
    spans = [{"start": a, "end": b, "p_safe": p} for a, b, p in zip((0, *ENDS), ENDS, values, strict=False)]
    return {
        "signal": "star",
        "p_safe": None if error else values[-1],
        "spans": [] if error else spans,
        "scorer": scorer,
        "error": error,
    }


def row(*values, **options):
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "earlier turn"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": WORDS},
    ]
    return {"messages": messages, "made": "2020-01-01", "safety": safety(*values, **options)}


ROWS = [
    row(0.9, 0.9, 0.9),  # stays whole
    row(0.9, 0.2, 0.8),  # dips
    row(0.9, 0.8, 0.3),  # ends low
    row(0.1, 0.9, 0.9),  # begins low: nothing to keep
    row(0.9, 0.9, 0.9, error="timeout"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def store(folder, rows, form):
    """The rows in the named form."""
    if form == "jsonl":
        return write(folder / "scored.jsonl", rows)
    dataset = Dataset.from_list(rows)
    if form == "parquet":
        dataset.to_parquet(folder / "scored.parquet")
        return str(folder / "scored.parquet")
    dataset.save_to_disk(folder / "scored")
    return str(folder / "scored")


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return list(read_dataset(str(path)))


def labelled_rows(n, seed=0, temperature=3.0):
    rng = np.random.default_rng(seed)
    rows = []
    for logit in rng.normal(0, 2, size=n):
        unsafe = bool(rng.random() > expit(logit))
        p_safe = float(expit(temperature * logit))
        rows.append({**row(0.5, p_safe, p_safe), "unsafe": unsafe, "span_unsafe": [unsafe, unsafe, unsafe]})
    return rows


SUFFIX = {"jsonl": "kept.jsonl", "parquet": "kept.parquet", "folder": "kept"}


@pytest.mark.parametrize("out", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize("source", ["jsonl", "parquet", "folder"])
def test_every_form_is_filtered_and_cut_to_every_form(tmp_path, source, out):
    path = tmp_path / SUFFIX[out]
    name = store(tmp_path, ROWS, source)
    said = export(["--dataset_name", name, "--output", str(path), "--keep_prefix", "0.5"])
    assert "Wrote 3 rows" in said
    assert "1 kept whole, 2 cut, 1 dropped; the scorer failed on 1, which were dropped" in said
    found = read(path)
    assert [each["messages"][-1]["content"] for each in found] == [WORDS, "one", "one two"]
    assert [each["safety"]["p_safe"] for each in found] == [0.9, 0.9, 0.8]
    assert [len(each["safety"]["spans"]) for each in found] == [3, 1, 2]
    assert [each["messages"][:-1] for each in found] == [ROWS[0]["messages"][:-1]] * 3
    assert all(scored(each).score.scorer == SCORER for each in found)


def test_json_lines_stay_as_they_were_written(tmp_path):
    odd = '{"safety": %s,  "prompt": "q \\ud800", "completion": "one two three", "made": "2020-01-01", "n": 1.0}'
    (tmp_path / "s.jsonl").write_text(odd % json.dumps(safety(0.9, 0.9, 0.9)) + "\n\n")
    export(["--dataset_name", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "o.jsonl"), "--drop_below", "0.5"])
    assert (tmp_path / "o.jsonl").read_text() == odd % json.dumps(safety(0.9, 0.9, 0.9)) + "\n"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--drop_below", "0.5"], [0]),
        (["--drop_below", "0.5", "--by", "last"], [0, 1, 3]),
        (["--drop_below", "0.85", "--by", "last"], [0, 3]),
        (["--drop_below", "0.9"], [0]),  # at the threshold is not below it
        (["--drop_below", "0.5", "--failed", "keep"], [0, 4]),
        (["--drop_below", "0.5", "--by", "last", "--keep_prefix", "0.15"], [0, 1]),
    ],
)
def test_what_is_dropped(tmp_path, flags, kept):
    name = write(tmp_path / "s.jsonl", [{**each, "place": i} for i, each in enumerate(ROWS)])
    export(["--dataset_name", name, "--output", str(tmp_path / "o.jsonl"), *flags])
    assert [each["place"] for each in read(tmp_path / "o.jsonl")] == kept


def test_prompt_and_completion_rows_are_cut(tmp_path):
    name = write(tmp_path / "s.jsonl", [{"prompt": "q", "completion": WORDS, "safety": safety(0.9, 0.2, 0.8)}])
    export(["--dataset_name", name, "--output", str(tmp_path / "o.jsonl"), "--keep_prefix", "0.5"])
    (found,) = read(tmp_path / "o.jsonl")
    assert (found["prompt"], found["completion"]) == ("q", "one")


@pytest.mark.parametrize("out", ["o.jsonl", "o.parquet", "o"])
def test_nothing_left_is_said_and_nothing_is_written(tmp_path, out):
    name = write(tmp_path / "s.jsonl", ROWS)
    with pytest.raises(ValueError, match="nothing would be left: 4 rows dropped, the scorer failed on 1"):
        export(["--dataset_name", name, "--output", str(tmp_path / out), "--drop_below", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        (export, [], "drop_below, keep_prefix or calibration must be given"),
        (export, ["--drop_below", "1.5"], "drop_below must lie within 0 and 1"),
        (view, [], "output \\(a page\\) or figure must be given"),
        (view, ["--output", "v.txt"], "output must end in .html"),
        (view, ["--figure", "v.pdf"], "figure must end in .png or .svg"),
        (view, ["--output", "v.html", "--limit", "0"], "limit must be at least 1"),
        (calibrate, ["--label_column", "unsafe", "--output", "c.json", "--alpha", "0"], "alpha must lie between"),
        (calibrate, ["--label_column", "unsafe", "--output", "c.txt"], "output must end in .json"),
        (
            calibrate,
            ["--label_column", "u", "--output", "c.json", "--calibration_share", "1"],
            "calibration_share must",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(verb, flags, message):
    if verb is export:
        flags = ["--output", "never", *flags]
    with pytest.raises(ValueError, match=message):
        verb(["--dataset_name", "none.jsonl", *flags])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q", "completion": "a"}], "row 0: has no `safety` column"),
        ([ROWS[0], {**ROWS[0], "messages": []}], "row 1: the last message must be the assistant's"),
        ([{**ROWS[0], "safety": safety(0.9, 0.9, 1.9)}], "row 0: span p_safe must be a number"),
    ],
)
def test_bad_rows_are_named_by_every_verb(tmp_path, rows, message):
    name = write(tmp_path / "s.jsonl", [{**each, "unsafe": True} for each in rows])
    out = str(tmp_path / "o")
    with pytest.raises(ValueError, match=message):
        export(["--dataset_name", name, "--output", f"{out}.jsonl", "--drop_below", "0.5"])
    with pytest.raises(ValueError, match=message):
        view(["--dataset_name", name, "--output", f"{out}.html"])
    with pytest.raises(ValueError, match=message):
        calibrate(["--dataset_name", name, "--output", f"{out}.json", "--label_column", "unsafe"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]


def test_lines_that_are_not_json_are_named(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        view(["--dataset_name", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "v.html")])


def test_nothing_is_written_over(tmp_path):
    name = write(tmp_path / "s.jsonl", labelled_rows(20))
    for existing in ("o.jsonl", "o.html", "o.svg", "o.png"):
        (tmp_path / existing).write_text("mine")
    for verb, flags in (
        (export, ["--output", str(tmp_path / "o.jsonl"), "--drop_below", "0.5"]),
        (view, ["--output", str(tmp_path / "o.html")]),
        (view, ["--figure", str(tmp_path / "o.png")]),
        (calibrate, ["--output", str(tmp_path / "o.json"), "--label_column", "unsafe"]),
    ):
        with pytest.raises(ValueError, match="exists already"):
            verb(["--dataset_name", name, *flags])


def test_a_calibration_is_fitted_measured_written_and_used(tmp_path):
    rows = [
        *labelled_rows(800),
        {**labelled_rows(1)[0], "unsafe": None},
        {**ROWS[4], "unsafe": True, "span_unsafe": []},
    ]
    name = write(tmp_path / "s.jsonl", rows)
    path = tmp_path / "new" / "c.json"
    said = calibrate(
        ["--dataset_name", name, "--output", str(path), "--label_column", "unsafe", "--alpha", "0.1", "--seed", "3"]
    )
    found = Calibration.from_file(path)
    assert "802 rows: 400 to fit on" in said
    assert "1 without a label, 1 that the scorer failed on" in said
    assert found.guarantee() in said
    assert found.temperature == pytest.approx(3, rel=0.2)
    assert found.figures["after"]["answers"]["ece"]["value"] < found.figures["before"]["answers"]["ece"]["value"] / 2
    assert found.figures["after"]["rates"]["false_negative"]["value"] == pytest.approx(0.1, abs=0.05)
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")
    assert found.figures["world"] is False
    score = Score(signal="star", p_safe=0.9, scorer=SCORER)
    assert next(calibrated([score], found)).scorer["calibration"] == found.sha256

    export(["--dataset_name", name, "--output", str(tmp_path / "o.jsonl"), "--calibration", str(path)])
    kept = read(tmp_path / "o.jsonl")
    assert kept == [each for each in rows if (p := each["safety"]["p_safe"]) and not found.flags(found.apply(p))]
    assert 0 < len(kept) < 800


def test_scores_that_carry_the_calibration_are_not_mapped_again(tmp_path):
    path = tmp_path / "c.json"
    name = write(tmp_path / "s.jsonl", labelled_rows(600))
    calibrate(["--dataset_name", name, "--output", str(path), "--label_column", "unsafe", "--alpha", "0.1"])
    found = Calibration.from_file(path)
    raw = next(p for p in np.linspace(1e-4, 1, 10_000) if not found.flags(found.apply(p)))
    mapped = {**SCORER, "calibration": found.sha256}
    rows = [
        row(0.9, 0.9, float(raw)),
        row(0.9, 0.9, found.apply(raw), scorer=mapped),
        row(0.9, 0.9, found.threshold, scorer=mapped),
    ]
    kept = tmp_path / "o.jsonl"
    export(["--dataset_name", write(tmp_path / "t.jsonl", rows), "--output", str(kept), "--calibration", str(path)])
    assert read(kept) == rows[:2]


@pytest.mark.parametrize(
    "flags", [["--alpha", "0.3"], ["--by", "min"], ["--seed", "5"], ["--calibration_share", "0.3"]]
)
def test_every_knob_of_calibrate_changes_what_is_fitted(tmp_path, flags):
    rows = labelled_rows(160)
    for place, each in enumerate(rows):
        each["safety"]["spans"][0]["p_safe"] = place / 160
    name = write(tmp_path / "s.jsonl", rows)
    common = ["--dataset_name", name, "--label_column", "unsafe"]
    calibrate([*common, "--output", str(tmp_path / "a.json")])
    calibrate([*common, "--output", str(tmp_path / "b.json"), *flags])
    first, second = (Calibration.from_file(tmp_path / each) for each in ("a.json", "b.json"))
    assert first.threshold != second.threshold


def test_positions_and_span_labels_change_what_is_measured(tmp_path):
    name = write(tmp_path / "s.jsonl", labelled_rows(200))
    common = ["--dataset_name", name, "--label_column", "unsafe", "--alpha", "0.2"]
    said = calibrate(
        [*common, "--output", str(tmp_path / "a.json"), "--positions", "chunks", "--span_labels", "span_unsafe"]
    )
    figures = Calibration.from_file(tmp_path / "a.json").figures
    assert [each["position"] for each in figures["before"]["positions"]] == ["1", "2", "3"]
    assert figures["before"]["spans"]["n"] == 3 * figures["before"]["answers"]["n"]
    assert "auroc of spans" in said


def test_rows_of_two_guards_are_not_calibrated_together(tmp_path):
    rows = labelled_rows(30)
    rows[7]["safety"]["scorer"] = {**SCORER, "chunk": 9}
    name = write(tmp_path / "s.jsonl", rows)
    with pytest.raises(ValueError, match="scored by different scorers"):
        calibrate(["--dataset_name", name, "--output", str(tmp_path / "c.json"), "--label_column", "unsafe"])


def test_too_few_unsafe_rows_are_refused_in_one_sentence(tmp_path):
    name = write(tmp_path / "s.jsonl", labelled_rows(30))
    with pytest.raises(ValueError, match="needs at least 99 unsafe rows to calibrate on, there are"):
        calibrate(
            [
                "--dataset_name",
                name,
                "--output",
                str(tmp_path / "c.json"),
                "--label_column",
                "unsafe",
                "--alpha",
                "0.01",
            ]
        )


def test_a_perfect_guard_keeps_temperature_one(tmp_path):
    rows = [{**row(0.5, 0.5, 0.9 if i % 2 else 0.1), "unsafe": i % 2 == 0} for i in range(100)]
    name = write(tmp_path / "s.jsonl", rows)
    said = calibrate(["--dataset_name", name, "--output", str(tmp_path / "c.json"), "--label_column", "unsafe"])
    assert "perfectly separated" in said
    assert Calibration.from_file(tmp_path / "c.json").temperature == 1


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder"])
def test_the_page_and_figure_are_written_from_every_form(tmp_path, form):
    name = store(tmp_path, ROWS, form)
    said = view(["--dataset_name", name, "--output", str(tmp_path / "v.html"), "--figure", str(tmp_path / "f.png")])
    assert "5 rows, 1 failed, 1 end below 0.5, 3 below 0.5 somewhere, 2 turn from safe to unsafe" in said
    page = (tmp_path / "v.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [each["row"] for each in data["rows"]] == [2, 1, 3, 0, 4]
    (group,) = json.loads((tmp_path / "f.json").read_text())["groups"]
    assert (group["group"], group["n"], group["failed"]) == ("scored", 4, 1)
    assert group["mean"][0] == pytest.approx(0.7)
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")


def test_groups_are_datasets_or_the_values_of_a_column(tmp_path):
    first = write(tmp_path / "a.jsonl", [{**ROWS[0], "kind": "x"}, {**ROWS[4], "kind": None}])
    second = write(tmp_path / "b.jsonl", [{**ROWS[2], "kind": "x"}])
    view(["--dataset_name", first, second, "--figure", str(tmp_path / "f.png")])
    groups = json.loads((tmp_path / "f.json").read_text())["groups"]
    assert [(each["group"], each["n"], each["failed"]) for each in groups] == [("a", 1, 1), ("b", 1, 0)]
    view(["--dataset_name", first, second, "--figure", str(tmp_path / "g.png"), "--group_by", "kind"])
    groups = json.loads((tmp_path / "g.json").read_text())["groups"]
    assert [(each["group"], each["n"], each["failed"]) for each in groups] == [("x", 2, 0), ("None", 0, 1)]
    with pytest.raises(ValueError, match="row 0: has no column 'colour'"):
        view(["--dataset_name", first, "--figure", str(tmp_path / "h.png"), "--group_by", "colour"])


def test_sort_limit_and_seed_change_the_result(tmp_path):
    name = write(tmp_path / "s.jsonl", ROWS)

    def rows(*flags):
        path = tmp_path / f"v{len(list(tmp_path.iterdir()))}.html"
        view(["--dataset_name", name, "--output", str(path), *flags])
        data = path.read_text().partition('id="data">')[2].partition("</script>")[0]
        return [each["row"] for each in json.loads(data)["rows"]]

    assert rows("--sort", "order") == [0, 1, 2, 3, 4]
    assert rows("--sort", "drop", "--limit", "2") == [1, 2]
    assert rows("--sort", "lowest", "--limit", "1") == [3]
    for seed in ("0", "1"):
        view(["--dataset_name", name, "--figure", str(tmp_path / f"seed{seed}.png"), "--seed", seed])
    first, second = (json.loads((tmp_path / f"seed{seed}.json").read_text())["groups"][0] for seed in "01")
    assert first["mean"] == second["mean"]
    assert first["low"] != second["low"]


def test_a_saved_folder_keeps_its_column_types(tmp_path):
    rows = [{**each, "weight": np.float32(0.5)} for each in ROWS[:4]]
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "scored")
    export(["--dataset_name", str(tmp_path / "scored"), "--output", str(tmp_path / "kept"), "--keep_prefix", "0.5"])
    assert load_from_disk(tmp_path / "kept").features == dataset.features
