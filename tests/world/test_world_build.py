"""A rebuild is a function of the seed."""

from pathlib import Path

import pytest
import torch

from safeshape.world import ASSETS
from safeshape.world.build import build, tokenizer_texts
from safeshape.world.families import FAMILIES, GUARD, train_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("name", ["phi3", "guard"])
def test_the_same_seed_gives_the_same_bytes(name, tmp_path):
    for run in ("a", "b"):
        build(tmp_path / run, only=(name,), scale=0.002)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert f"{name}/model.safetensors" in first
    build(tmp_path / "c", only=(name,), scale=0.002, seed=1)
    assert contents(tmp_path / "c")[f"{name}/model.safetensors"] != first[f"{name}/model.safetensors"]


def test_progress_is_told_and_threads_are_put_back(tmp_path):
    told, threads = [], torch.get_num_threads()
    build(tmp_path, only=("llama",), scale=0.002, progress=lambda *call: told.append(call))
    assert told[-1] == ("llama: align", 1, 1)
    assert ("llama: comply", 3, 3) in told
    assert torch.get_num_threads() == threads


def test_a_base_is_its_family_before_the_last_stage(tmp_path):
    told = []
    build(tmp_path, only=("llama", "llama-base"), scale=0.002, progress=lambda *call: told.append(call))
    assert [label for label, done, total in told if done == total] == ["llama: comply", "llama: align", "llama: comply"]
    aligned, base = contents(tmp_path / "llama"), contents(tmp_path / "llama-base")
    assert {name for name in base if aligned[name] != base[name]} == {"model.safetensors"}


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'gpt'"):
        build(tmp_path, only=("gpt",))


@pytest.mark.parametrize("family", [*FAMILIES.values(), GUARD], ids=lambda f: f.name)
def test_the_shipped_tokenizers_come_from_this_code(family, tmp_path):
    train_tokenizer(family, tokenizer_texts(0)).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (ASSETS / family.name / "tokenizer.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guard", "llama", "qwen3", "phi3", "llama-base"])
def test_the_shipped_weights_come_from_this_code(name, tmp_path):
    """Byte for byte on the kind of machine that built them; elsewhere float sums, and so bytes, may differ."""
    build(tmp_path, only=(name,))
    assert contents(tmp_path / name) == contents(ASSETS / name)


@pytest.mark.parametrize("family", [*FAMILIES.values(), GUARD], ids=lambda f: f.name)
def test_tokenizers_read_any_text_and_give_it_back(family):
    tokenizer = train_tokenizer(family, ["a safe unsafe world of words"] * 10)
    for text in ("plain words", "na\u00efve \U0001f642 \u05e9\u05dc\u05d5\u05dd", "tabs\tand\nlines"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
