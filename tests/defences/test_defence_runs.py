"""Every defence from one mapping, with an adapter and with all weights."""

import pytest
import torch
from conftest import tiny_model
from defending import defend
from training import lora

from safeshape.defences import DEFENCES

QUICK = {
    "safe_instruct": {"share": 0.5},
    "lisa": {"align_steps": 1, "user_steps": 1},
    "vaccine": {"epochs": 1},
    "t_vaccine": {"epochs": 1, "layers": 1, "every": 1},
    "booster": {"epochs": 1},
    "repnoise": {"epochs": 1},
    "seal": {"epochs": 1, "keep": 0.5},
    "one_shot": {"epochs": 2, "learning_rate": 1e-3},
    "safe_delta": {"s": 100.0},
    "safe_lora": {"threshold": 1.0},
}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", sorted(DEFENCES))
def test_every_defence_runs_from_one_mapping_and_trains(tmp_path, tokenizer, name, adapter):
    options = {"peft_config": lora()} if adapter else {}
    found = defend(tmp_path, tokenizer, {"name": name, **QUICK.get(name, {})}, **options)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before, after = tiny_model()(ids).logits, found.model.eval()(ids).logits
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4
    assert found.trainer.record()["defence"]["name"] == name
    assert (found.system_prompt is not None) == (name == "ptst")
