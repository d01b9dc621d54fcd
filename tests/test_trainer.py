"""SafeTrainer against TRL's SFTTrainer, against itself under batching, and its start, stop and resume."""

import json

import pytest
import torch
from conftest import conversation, tiny_model
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig
from training import config, lora, losses, make, parameters, rows
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from safeshape import SafeTrainer
from safeshape.losses import DIVERGENCES
from safeshape.models import Frozen
from safeshape.policies import POLICIES


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_uniform_policy_equals_trl(tmp_path, tokenizer, accumulation, adapter):
    data = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows(16)]
    # Adam turns rounding noise in near-zero gradients into steps of the learning rate, so it is an ordinary one.
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    theirs = SFTTrainer(
        tiny_model(),
        config(tmp_path, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    theirs.train()
    options = {"peft_config": lora()} if adapter else {}
    ours = make(tmp_path, tokenizer, data=data, policy="sft", settings=settings, **options)
    ours.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=2e-6)
    assert len(losses(ours)) == 4
    assert (parameters(ours.model) - parameters(theirs.model)).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["strings", "messages"])
def test_tokens_and_labels_equal_trls(tmp_path, tokenizer, form):
    data = rows(6)
    if form == "strings":
        data = [{"prompt": r["messages"][0]["content"], "completion": " " + r["messages"][1]["content"]} for r in data]
    else:
        data = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in data]
    dataset, settings = Dataset.from_list(data), config(tmp_path)
    theirs = SFTTrainer(tiny_model(), settings, train_dataset=dataset, processing_class=tokenizer).train_dataset
    ours = make(tmp_path, tokenizer, data=data, policy="sft").train_dataset
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]
    assert any(label != -100 for label in ours["labels"][0])


def moved_reference():
    return tiny_model(seed=1)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_batch_4_equals_4_times_batch_1(tmp_path, tokenizer, policy, divergence):
    spec = {"name": policy, "divergence": divergence}
    if policy == "adaptive":
        spec |= {"scope": "batch", "ema": 0.5}
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer = make(
            tmp_path, tokenizer, policy=spec, reference=moved_reference(), settings=settings | {"max_steps": 2}
        )
        trainer.train()
        found.append((losses(trainer), parameters(trainer.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-5


def test_the_reference_gets_into_the_loss(tmp_path, tokenizer):
    runs = []
    for reference in (moved_reference(), "copy"):
        trainer = make(tmp_path, tokenizer, policy="fixed_kl", reference=reference, settings={"max_steps": 1})
        trainer.train()
        runs.append(trainer.state.log_history[0])
    assert runs[0]["kl"] > 0.1
    assert runs[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert runs[1]["ce"] == pytest.approx(runs[0]["ce"])


def test_weights_reach_the_loss(tmp_path, tokenizer):
    """With p_safe 0 on every token star learns nothing; with 1 it is plain SFT; the mean weight is logged."""
    logged = []
    for p_safe in (0.0, 1.0):
        data = rows()
        for row in data:
            row["safety"] = {"signal": "test", "p_safe": p_safe, "spans": []}
        trainer = make(tmp_path, tokenizer, data=data, settings={"max_steps": 1})
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[0]["ce_weight"] == 0
    assert logged[0]["kl_weight"] == 0.5
    assert logged[0]["risk_hist/0.8"] == 1
    assert logged[1]["ce_weight"] == 1
    assert logged[1]["kl_weight"] == 0
    assert logged[1]["loss"] == pytest.approx(logged[1]["ce"])
    assert logged[1]["risk_hist/0.0"] == 1


def test_batch_scope_uses_the_mean_over_the_global_batch(tmp_path, tokenizer):
    """Risks 0, 0, 0, 1 in four micro-batches of one: every token gets beta = 0.1 + 0.8 / 4 = 0.3."""
    data = rows(4)
    for row, p_safe in zip(data, (1.0, 1.0, 1.0, 0.0), strict=True):
        row["safety"] = {"signal": "test", "p_safe": p_safe, "spans": []}
    spec = {"name": "adaptive", "scope": "batch"}
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make(tmp_path, tokenizer, data=data, policy=spec, settings=settings)
    trainer.train()
    assert trainer.state.log_history[0]["kl_weight"] == pytest.approx(0.3, abs=1e-6)
    trainer = make(tmp_path, tokenizer, data=data, policy="adaptive", settings=settings)
    trainer.train()
    assert trainer.state.log_history[0]["kl_weight"] != pytest.approx(0.3, abs=1e-2)


def test_ema_follows_its_recursion(tmp_path, tokenizer):
    data = rows(8)
    for row in data:
        row["safety"] = {"signal": "test", "p_safe": 1.0, "spans": []}
    trainer = make(
        tmp_path,
        tokenizer,
        data=data,
        policy={"name": "adaptive", "scope": "batch", "ema": 0.75},
        settings={"max_steps": 1},
    )
    trainer.smoothed.value = 1.0
    trainer.train()
    # s = 0.75 * 1 + 0.25 * 0; beta = 0.1 + 0.8 * 0.75
    assert trainer.state.log_history[0]["kl_weight"] == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_lora_references_agree_and_only_adapters_move(tmp_path, tokenizer, adapter):
    found = []
    for reference in ("adapter_off", "copy", "cached"):
        model = tiny_model()
        model.config.tie_word_embeddings = False
        trainer = make(tmp_path, tokenizer, model=model, reference=reference, peft_config=lora(**adapter))
        base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
        assert trainer.state.log_history[-2]["kl"] > 0
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6)


def test_auto_stores_states_that_are_read_again_and_else_keeps_the_reference_alive(tmp_path, tokenizer):
    # 8 rows in batches of 4: 4 steps are two epochs, 2 are one.
    assert make(tmp_path, tokenizer).reference_kind == "cached"
    assert make(tmp_path, tokenizer, peft_config=lora()).reference_kind == "cached"
    one, half = {"max_steps": 2}, {"max_steps": 1}
    assert make(tmp_path, tokenizer, peft_config=lora(), settings=one).reference_kind == "adapter_off"
    assert make(tmp_path, tokenizer, settings=one).reference_kind == "cached"
    assert make(tmp_path, tokenizer, settings=half).reference_kind == "copy"
    assert make(tmp_path, tokenizer, policy="sft").reference_kind is None
    assert make(tmp_path, tokenizer, reference=tiny_model()).reference_kind == "model"


def test_a_copied_reference_stays_put(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, reference="copy")
    before = parameters(trainer.reference.model)
    trainer.train()
    assert torch.equal(parameters(trainer.reference.model), before)
    assert not torch.equal(parameters(trainer.model), before)


def test_references_that_are_not_the_start_or_not_frozen_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="trains biases"):
        make(tmp_path, tokenizer, peft_config=lora(bias="lora_only"))
    with pytest.raises(ValueError, match="needs a PEFT model"):
        make(tmp_path, tokenizer, reference="adapter_off")
    with pytest.raises(ValueError, match="unknown reference 'frozen'"):
        make(tmp_path, tokenizer, reference="frozen")
    trained = make(tmp_path, tokenizer, peft_config=lora())
    trained.train()
    with pytest.raises(RuntimeError, match="differs from the starting model"):
        make(tmp_path, tokenizer, model=trained.model).train()
    trainer = make(tmp_path, tokenizer, reference="copy")
    trainer.reference = Frozen(model=trainer.model)
    with pytest.raises(RuntimeError, match="moves with the model"):
        trainer.train()
    with pytest.raises(ValueError, match="the reference knows 256 tokens, the tokenizer"):
        make(tmp_path, tokenizer, reference=tiny_model(vocab_size=256)).train()


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_a_reference_whose_vocabulary_is_padded_further_is_the_same_reference(tmp_path, tokenizer, head):
    runs = []
    for rows_of_the_head in (512, 640):
        reference = moved_reference()
        reference.resize_token_embeddings(rows_of_the_head)
        trainer = make(tmp_path, tokenizer, policy="fixed_kl", reference=reference, loss_head=head)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_gradient_floor_skips_noise_and_can_be_switched_off(tmp_path, tokenizer):
    data = rows()
    for row in data:
        row["safety"] = {"signal": "test", "p_safe": 0.0, "spans": []}
    still = make(tmp_path, tokenizer, data=data)
    start = parameters(still.model)
    still.train()
    assert torch.equal(parameters(still.model), start)
    assert still.state.log_history[-1]["skipped_updates"] == 1
    # The dense loss rounds policy and reference differently; the fused one subtracts equal numbers.
    noisy = make(tmp_path, tokenizer, data=data, gradient_floor=0.0, loss_head="dense", reference="copy")
    noisy.train()
    assert (parameters(noisy.model) - start).abs().max() > 1e-3
    assert noisy.state.log_history[-1]["skipped_updates"] == 0


def test_resume_continues_the_same_run(tmp_path, tokenizer):
    spec = {"name": "adaptive", "scope": "batch", "ema": 0.9}
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(tmp_path / "a", tokenizer, policy=spec, settings=settings)
    whole.train()
    again = make(tmp_path / "a", tokenizer, policy=spec, settings=settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(parameters(again.model), parameters(whole.model))
    assert again.smoothed.value == whole.smoothed.value
    assert again.floor.updates == whole.floor.updates == 4


def test_resume_refuses_changed_data_and_policy(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make(tmp_path, tokenizer, settings=settings).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    changed = rows()
    changed[3]["safety"]["spans"][0]["p_safe"] += 0.001
    with pytest.raises(ValueError, match="the training data changed"):
        make(tmp_path, tokenizer, data=changed, settings=settings).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="its policy was"):
        make(tmp_path, tokenizer, policy="soft_weight", settings=settings).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="its reference was cached, now it is model"):
        other = make(tmp_path, tokenizer, reference=moved_reference(), settings=settings)
        other.train(resume_from_checkpoint=checkpoint)
    same = make(tmp_path, tokenizer, reference="copy", settings=settings)  # the starting model, kept in another way
    same.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="no complete checkpoint to resume"):
        make(tmp_path / "new", tokenizer, settings=settings).train(resume_from_checkpoint=True)


def test_what_is_saved_loads_with_plain_transformers_and_peft(tmp_path, tokenizer):
    full = make(tmp_path / "full", tokenizer)
    full.train()
    full.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(parameters(loaded), parameters(full.model))
    record = json.loads((tmp_path / "full" / "safeshape.json").read_text())
    assert record["policy"] == {"name": "star", "divergence": "reverse"}
    assert record["reference"] == "cached"
    assert record["data"]["rows"] == 8
    assert record["signals"] == [{"signal": "test", "scorer": None, "rows": 8}]
    assert set(record["versions"]) >= {"torch", "trl", "transformers"}
    assert "fox" not in json.dumps(record)
    adapter = make(tmp_path / "lora", tokenizer, peft_config=lora())
    adapter.train()
    adapter.save_model()
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapter.model.eval()(ids).logits, atol=1e-6)


def test_a_stream_trains_like_its_rows(tmp_path, tokenizer):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4}
    runs = []
    for stream in (False, True):
        data = Dataset.from_list(rows())
        trainer = SafeTrainer(
            tiny_model(),
            config(tmp_path, train_sampling_strategy="sequential", **settings),
            train_dataset=data.to_iterable_dataset() if stream else data,
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


def test_tokens_are_counted_as_trl_counts_them(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, settings={"max_steps": 2})
    trainer.train()
    assert trainer.state.log_history[-1]["num_tokens"] == sum(len(ids) for ids in trainer.train_dataset["input_ids"])


def test_evaluation_uses_the_same_loss(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, policy="fixed_kl", reference=moved_reference())
    numbers = trainer.evaluate(Dataset.from_list(rows()))
    assert numbers["eval_loss"] == pytest.approx(0.5 * numbers["eval_ce"] + 0.5 * numbers["eval_kl"], rel=1e-4)


def nan_policy(p_safe_BT, *, batch):
    from safeshape import Weights

    return Weights(ce_BT=p_safe_BT / 0, kl_BT=0 * p_safe_BT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "stars"}, "unknown policy 'stars'"),
        ({"overlong": "drop"}, "overlong must be refuse or truncate"),
        ({"settings": {"packing": True, "packing_strategy": "wrapped"}}, "does not support packing_strategy"),
        ({"settings": {"use_liger_kernel": True}}, "does not support use_liger_kernel=True"),
        ({"loss_head": "chunked"}, "loss_head must be one of auto, fused, dense"),
        ({"cache_dtype": "int8"}, "cache_dtype must be one of auto, float32"),
        ({"settings": {"loss_type": "dft"}}, "does not support loss_type='dft'"),
        ({"data_collator": object()}, "brings its own data_collator"),
        ({"compute_loss_func": print}, "does not support compute_loss_func"),
        ({"formatting_func": str}, "does not support formatting_func"),
        ({"data": []}, "the train dataset is empty"),
        ({"data": [{"messages": conversation("a", "b")}]}, "train row 0: has no `safety` score"),
    ],
)
def test_bad_settings_are_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, **options)


def test_prompt_learning_is_refused(tmp_path, tokenizer):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        make(tmp_path, tokenizer, peft_config=virtual)


def test_weights_that_are_not_finite_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="gave a ce weight that is not a finite number"):
        make(tmp_path, tokenizer, policy=nan_policy).train()
