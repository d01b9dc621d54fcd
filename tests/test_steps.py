"""The fused step against the dense one, for every policy, reference and architecture, and where it must give way."""

import pytest
import torch
from conftest import tiny_model
from torch import nn
from training import lora, losses, make, parameters
from transformers import AutoConfig, AutoModelForCausalLM

from safeshape.models import read_head
from safeshape.policies import POLICIES

ADAM_FREE = {"optim": "sgd", "max_steps": 3}


def run(folder, tokenizer, **options):
    trainer = make(folder, tokenizer, settings=ADAM_FREE, **options)
    trainer.train()
    return trainer


def assert_same(a, b, tolerance=1e-5):
    assert losses(a) == pytest.approx(losses(b), rel=tolerance)
    for name in ("ce", "kl", "ce_weight", "kl_weight"):
        first, second = ([e[name] for e in t.state.log_history if name in e] for t in (a, b))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), name
    assert (parameters(a.model) - parameters(b.model)).abs().max() < tolerance


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("reference", ["copy", "cached"])
def test_fused_equals_dense_for_every_policy(tmp_path, tokenizer, policy, reference):
    fused, dense = (
        run(tmp_path / head, tokenizer, policy=policy, reference=reference, loss_head=head)
        for head in ("fused", "dense")
    )
    assert fused.loss_head == "fused"
    assert_same(fused, dense)


@pytest.mark.parametrize("reference", ["adapter_off", "copy", "cached"])
def test_fused_equals_dense_with_an_adapter(tmp_path, tokenizer, reference):
    options = {"peft_config": lora(), "reference": reference}
    fused, dense = (run(tmp_path / head, tokenizer, loss_head=head, **options) for head in ("fused", "dense"))
    assert_same(fused, dense)
    assert fused.model.get_base_model().lm_head.weight.grad is None


HEADS = {
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # its head has a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_heads_that_scale_cap_or_add_a_bias(tmp_path, tokenizer, kind):
    def model():
        torch.manual_seed(0)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        settings = ({} if kind == "gpt2" else shape) | HEADS[kind]
        shared = {"vocab_size": 512, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shared, **settings))
        if kind == "phi":
            nn.init.normal_(made.lm_head.bias)
        return made.eval()

    head = read_head(model())
    assert (head.scale, head.softcap, head.bias_V is not None) == {
        "gemma2": (1.0, 5.0, False),
        "granite": (1 / 3.0, None, False),
        "cohere": (0.25, None, False),
        "phi": (1.0, None, True),
        "gpt2": (1.0, None, False),
    }[kind]
    fused, dense = (run(tmp_path / h, tokenizer, model=model(), loss_head=h) for h in ("fused", "dense"))
    assert fused.loss_head == "fused"
    assert_same(fused, dense, 3e-5)


class Shifted(nn.Linear):
    """A head that is not its weight alone."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden.sum(-1, keepdim=True) * torch.linspace(0, 1, self.out_features)


def odd_model():
    model = tiny_model()
    head = Shifted(32, 512, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def test_a_head_that_cannot_be_read_is_seen_and_full_logits_are_built(tmp_path, tokenizer, caplog):
    trainer = run(tmp_path, tokenizer, model=odd_model(), reference="copy")
    assert trainer.loss_head == "dense"
    assert "full logits are built" in caplog.text
    with pytest.raises(RuntimeError, match="does not give the model's own logits"):
        run(tmp_path, tokenizer, model=odd_model(), loss_head="fused")


def test_full_logits_are_never_built_in_a_fused_step(tmp_path, tokenizer):
    """After the check at the start the model's own head is not called again."""
    trainer = make(tmp_path, tokenizer, settings=ADAM_FREE, reference="copy")
    calls = []
    trainer._start()
    for model in (trainer.model, trainer.reference.model):
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    assert len(losses(trainer)) == 3
