"""The safety card: what stands in it, where, and that the rest of the model card stays byte for byte."""

import hashlib
import json

import pytest
from huggingface_hub import ModelCard
from report_rows import HOSTILE, rate, score

from safeshape.report.card import BEGIN, END, card_section, make_card, with_section, write_card
from safeshape.report.tables import WORLD_NOTE


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def card(folder, *more, defence="star", **fields):
    rows = [rate(3, 150, **fields), rate(140, 150, defence="sft", **fields), *more]
    return make_card(rows, folder, defence=defence)


def test_the_card_holds_what_was_tried_with_intervals_controls_and_hashes(folder):
    (folder / "safeshape.json").write_text(
        json.dumps({"policy": {"name": "star", "kl": 0.5}, "data": {"rows": 7, "sha256": "ab" * 32}, "signals": []})
    )
    made = card(folder, score(1.5, category="malware"))
    assert made["sha256"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert [item["value"] for item in made["results"]] == [0.02, 1.5]
    assert made["results"][0]["low"] < 0.02 < made["results"][0]["high"]
    assert made["controls"][0]["defence"] == "sft"
    assert made["versions"]["torch"]
    text = card_section(made)
    assert "| a | attack success | 2.0 % | 0.7 to 5.7 | 150 | 1 | oracle |" in text
    assert "| malware | a | harmfulness | 1.50 of 5 | 1.25 to 1.75 | 30 |" in text
    assert "policy name star, kl 0.5; 7 rows" in text
    assert "Controls measured beside it (in `safety.json`): sft." in text
    assert WORLD_NOTE in text
    assert WORLD_NOTE not in card_section(card(folder, world=False))


def test_a_judges_error_is_measured_or_said_not_to_be(folder):
    assert "oracle: error exact" in card_section(card(folder))
    unmeasured = card_section(card(folder, judge="llm", world=False))
    assert "llm: error not measured" in unmeasured
    assert "oracle: error not measured" in card_section(card(folder, world=False))  # only the world's is exact
    kappa = rate(80, metric="judge_agreement", judge="llm", defence="none", world=False)
    measured = card(folder, kappa, judge="llm", world=False)
    assert measured["judges"]["llm"]["error"] == "measured"
    assert "judge\\_agreement 80.0 % (71.1 to 86.7), n=100" in card_section(measured)
    assert all(item["metric"] != "judge_agreement" for item in measured["results"] + measured["controls"])


def test_the_readme_keeps_its_metadata_and_text_and_the_section_is_replaced(folder):
    readme = "---\nlicense: mit\nbase_model: a/b\ntags:\n- trl\n---\n\r\n# Mine \u00e9\n\ntext  \n"
    (folder / "README.md").write_bytes(readme.encode())
    write_card(folder, card(folder))
    first = (folder / "README.md").read_bytes().decode()
    assert first.startswith(readme.rstrip("\n"))
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    write_card(folder, card(folder))
    assert (folder / "README.md").read_bytes().decode() == first  # idempotent
    (folder / "README.md").write_bytes((first + "\nafter\n").encode())
    write_card(folder, card(folder, rate(75, 150, metric="over_refusal")))
    second = (folder / "README.md").read_bytes().decode()
    assert second.count(BEGIN) == second.count(END) == 1
    assert second.endswith("\nafter\n")
    assert "over refusal" in second
    assert json.loads((folder / "safety.json").read_text())["results"][1]["metric"] == "over_refusal"


def test_a_folder_without_a_readme_gets_one_that_the_hub_can_read(folder):
    write_card(folder, card(folder))
    assert "safeshape" in ModelCard.load(folder / "README.md").data.tags


@pytest.mark.parametrize("readme", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_damaged_markers_are_refused_before_anything_is_written(folder, readme):
    (folder / "README.md").write_text(readme)
    with pytest.raises(ValueError, match="not one pair"):
        write_card(folder, card(folder))
    assert (folder / "README.md").read_text() == readme
    assert not (folder / "safety.json").exists()


def test_names_are_cut_and_escaped_and_backslashes_survive(folder):
    long = "x" * 500
    made = card(folder, attack=f"{HOSTILE} {long} \\1")
    text = card_section(made)
    assert "<script" not in text
    assert long not in json.dumps(made)
    line = next(line for line in text.splitlines() if "alert" in line)
    assert line.replace("\\|", "").count("|") == 8
    assert with_section("a\n", "\\1 \\g<0>").count("\\g<0>") == 1
    assert with_section(f"{BEGIN}{END}", "\\1 \\g<0>") == "\\1 \\g<0>"


def test_what_has_no_card(folder, tmp_path):
    with pytest.raises(ValueError, match="no row has the defence 'dpo'; there are: star, sft"):
        card(folder, defence="dpo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        card(tmp_path / "empty")
