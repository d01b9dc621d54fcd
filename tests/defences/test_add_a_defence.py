"""The page that walks through adding a defence is run as it stands."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from safeshape.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-defence.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    definition, use = BLOCKS
    lines = len([line for line in definition.splitlines() if line.strip()])
    assert lines < 40
    assert f"This one, {lines} lines," in PAGE
    (tmp_path / "my_defence.py").write_text(definition)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "world").symlink_to(ROOT / "recipes" / "world")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space = {}
    (line,) = re.findall(r"```\nsafeshape (.*)\n```", PAGE)
    try:
        exec(compile(use, "add-a-defence.md", "exec"), space)
        module = importlib.import_module("my_defence")
        assert main([*shlex.split(line), "--use_cpu", "true", "--disable_tqdm", "true"]) == 0
    finally:
        sys.modules.pop("my_defence", None)
    found = space["found"]
    assert 0 < len(found.trainer.train_dataset) < len(space["rows"])
    assert found.trainer.stepper.strength == 0.5
    record = json.loads((tmp_path / "verb" / "safeshape.json").read_text())
    assert record["defence"] == {"name": "pull_back", "strength": 0.5}
    record = json.loads((tmp_path / "defended" / "safeshape.json").read_text())
    assert record["defence"] == {"name": "pull_back", "strength": 0.5, "word": "Step two"}
    assert (tmp_path / "defended" / "model.safetensors").is_file()
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ("a secret", "b")]
    assert len(module.pull_back(word="secret").prepare(Dataset.from_list(rows), None)) == 1


def test_the_pull_is_what_the_page_says():
    """strength 0.1, gradient 3, moved by 2: 3 + 0.1 * 2."""
    import torch
    from defending import loop_of, weight

    space = {}
    exec(BLOCKS[0], space)
    w = weight(1.0)
    stepper = space["pull_back"]().stepper(None)
    stepper.start(None, {"w": w})
    w.data = torch.tensor([3.0])
    stepper.gradients(loop_of(w, user=lambda w: 3 * w.sum()))
    assert w.grad.item() == pytest.approx(3.2)
