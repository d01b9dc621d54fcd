"""What users switch on beside us: checkpointed activations, bf16, compilation, other kernels, LoRA on everything."""

import pytest
import torch
from conftest import tiny_model
from training import config, lora, losses, make, parameters, rows

from safeshape import world
from safeshape.models import load

SGD = {"optim": "sgd", "max_steps": 3}


def run(folder, tokenizer, settings=None, **options):
    trainer = make(folder, tokenizer, settings=SGD | (settings or {}), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reference", ["adapter_off", "copy", "cached"])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, reference, reentrant):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    options = {"reference": reference, "peft_config": lora()}
    plain = run(tmp_path / "a", tokenizer, **options)
    saved = run(tmp_path / "b", tokenizer, settings, **options)
    assert losses(saved) == pytest.approx(losses(plain), rel=1e-6)
    assert (parameters(saved.model) - parameters(plain.model)).abs().max() < 1e-6


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("reference", ["copy", "cached"])
def test_bf16_autocast_stays_close_to_float32(tmp_path, tokenizer, reference, head):
    """Both models run in the same precision: at the start the divergence is zero, not rounding noise."""
    exact = run(tmp_path / "a", tokenizer, policy="fixed_kl", reference=reference)
    half = run(tmp_path / "b", tokenizer, {"bf16": True}, policy="fixed_kl", reference=reference, loss_head=head)
    assert losses(half) == pytest.approx(losses(exact), rel=0.02)
    assert losses(half) != losses(exact)
    first = half.state.log_history[0]["kl"]
    assert first == pytest.approx(0, abs=1e-5 if reference == "copy" else 1e-3)


def test_a_bf16_model_trains_with_every_reference(tmp_path, tokenizer):
    runs = []
    for reference in ("adapter_off", "copy", "cached"):
        model = tiny_model().to(torch.bfloat16)
        runs.append(losses(run(tmp_path / reference, tokenizer, model=model, peft_config=lora(), reference=reference)))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    assert runs[0] == pytest.approx(runs[2], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", "cached"])
def test_compiled_models_give_the_same_losses(tmp_path, tokenizer, reference):
    options = {"reference": reference, "peft_config": lora()}
    plain = run(tmp_path / "a", tokenizer, **options)
    compiled = run(tmp_path / "b", tokenizer, {"torch_compile": True}, **options)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_lora_on_every_linear_layer_leaves_the_head_frozen(tmp_path, tokenizer):
    adapter = lora()
    adapter.target_modules = "all-linear"
    runs = [run(tmp_path / head, tokenizer, peft_config=adapter, loss_head=head) for head in ("fused", "dense")]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert not any("lm_head" in name for name, p in runs[0].model.named_parameters() if p.requires_grad)


def test_an_untied_head_that_is_trained_beside_an_adapter_keeps_its_start_as_reference(tmp_path, tokenizer):
    """`modules_to_save=["lm_head"]`: the reference's head is the untouched original."""
    runs = []
    for reference in ("adapter_off", "copy", "cached"):
        model = tiny_model()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        adapter = lora(modules_to_save=["lm_head"])
        trainer = run(tmp_path / reference, tokenizer, model=model, peft_config=adapter, reference=reference)
        runs.append(losses(trainer))
        assert trainer.state.log_history[-2]["kl"] > 1e-4
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0] == pytest.approx(runs[2], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_states_stored_in_bf16_move_the_divergence_by_less_than_1e_5(tmp_path, family):
    model, tokenizer = load(world.path(family))
    found = []
    for dtype in ("float32", "bfloat16"):
        trainer = make(
            tmp_path / dtype,
            tokenizer,
            model=model,
            data=rows(16),
            policy="fixed_kl",
            reference="cached",
            cache_dtype=dtype,
            settings={"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 16},
        )
        trainer.train()
        found.append(trainer.state.log_history[0]["kl"])
    assert abs(found[0]) < 1e-9
    assert 0 < found[1] < 1e-5


def test_trl_settings_without_meaning_here_are_refused(tmp_path):
    from safeshape.refusals import refuse_model, refuse_unsupported

    class Parallel:
        cp_enabled, sp_enabled = True, False

    with pytest.raises(ValueError, match="context and sequence parallelism"):
        refuse_model(tiny_model(), False, Parallel())
    with pytest.raises(ValueError, match="activation_offloading=True"):
        refuse_unsupported(config(tmp_path, activation_offloading=True, gradient_checkpointing=False))
