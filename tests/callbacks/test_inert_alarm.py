"""Every alarm rings on the fault it is for, and none on healthy runs."""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import conversation
from training import lora, make, rows

from safeshape.callbacks import InertAlarm
from safeshape.models.reference import AdapterOff
from safeshape.policies import POLICIES
from safeshape.types import Weights

STEPS = 8


def run(folder, tokenizer, alarm, *, settings=None, prepare=lambda trainer: None, **options):
    trainer = make(folder, tokenizer, settings={"max_steps": STEPS, **(settings or {})}, **options)
    alarm.attach(trainer)
    prepare(trainer)
    trainer.train()
    return trainer


def fired(folder, tokenizer, **options):
    alarm = InertAlarm(patience=3)
    run(folder, tokenizer, alarm, **options)
    return alarm.fired


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "star"},
        {"policy": "star", "peft_config": lora()},
        {"policy": "star", "reference": "cached"},
        {"policy": "star", "loss_head": "dense"},
        {"policy": "adaptive"},
        {"policy": {"name": "adaptive", "scope": "batch"}},
        {"policy": "sft"},  # equal weights are what it is
        {"policy": "fixed_kl"},
        {"policy": "constrained"},
        {"policy": "rejection"},
        {"policy": "star", "settings": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values() if isinstance(v, str)),  # the same in every process
)
def test_healthy_runs_are_silent(tmp_path, tokenizer, options):
    assert fired(tmp_path, tokenizer, **options) == []


def test_scores_that_are_all_the_same_ring(tmp_path, tokenizer):
    flat = [{**row, "safety": {"signal": "t", "p_safe": 0.7, "spans": []}} for row in rows()]
    assert fired(tmp_path / "a", tokenizer, data=flat) == ["equal_weights"]
    one = [*flat[1:], {**flat[0], "safety": {"signal": "t", "p_safe": 0.6, "spans": []}}]
    assert fired(tmp_path / "b", tokenizer, data=one) == []


def test_weights_of_zero_ring(tmp_path, tokenizer):
    unsafe = [{**row, "safety": {"signal": "t", "p_safe": 0.1, "spans": []}} for row in rows()]
    assert fired(tmp_path, tokenizer, data=unsafe, policy="rejection") == ["zero_weights"]


def test_masked_tokens_ring(tmp_path, tokenizer):
    def mask(trainer):
        collate, start = trainer.data_collator, trainer._start

        def masked(examples):
            batch = collate(examples)
            batch["labels"] = torch.full_like(batch["labels"], -100)
            return batch

        def started():
            start()  # which looks at two rows itself
            trainer.data_collator = masked

        trainer._start = started

    assert "no_tokens" in fired(tmp_path, tokenizer, policy="sft", prepare=mask)


def test_a_reference_with_the_adapter_left_on_rings(tmp_path, tokenizer, monkeypatch):
    """The reference runs with the adapter on from the third step, after everything was verified at the start."""
    honest = AdapterOff.states

    def follows(self, policy, unwrapped, batch, reader=None):
        if not torch.is_grad_enabled() or policy.training is False:
            return honest(self, policy, unwrapped, batch, reader)
        from safeshape.models.reference import evaluation_mode, states_of

        with torch.no_grad(), evaluation_mode(policy):
            return states_of(policy, batch, reader)

    alarm = InertAlarm(patience=3)
    trainer = make(tmp_path, tokenizer, settings={"max_steps": STEPS}, peft_config=lora(), reference="adapter_off")
    alarm.attach(trainer)
    start = trainer._start

    def started():
        start()
        monkeypatch.setattr(AdapterOff, "states", follows)

    trainer._start = started
    trainer.train()
    assert alarm.fired == ["reference_moves"]


def test_weights_that_do_not_move_ring(tmp_path, tokenizer):
    assert fired(tmp_path, tokenizer, settings={"learning_rate": 0.0}) == ["still"]


def test_updates_skipped_as_noise_are_no_fault(tmp_path, tokenizer):
    # Nothing to learn: every token unsafe and held at the reference, so that every update is skipped.
    spans = [{"start": 0, "end": 3, "p_safe": 0.0}]
    held = [{"messages": conversation("one", "two three"), "safety": {"signal": "t", "p_safe": 0.0, "spans": spans}}]
    alarm = InertAlarm(patience=3)
    trainer = run(tmp_path, tokenizer, alarm, data=held * 8)
    assert trainer.floor.skipped == STEPS
    assert alarm.fired == ["equal_weights"]  # which is true: every weight is 0; but neither "still" nor the reference


def test_it_is_said_once_or_raised(tmp_path, tokenizer, caplog):
    flat = [{**row, "safety": {"signal": "t", "p_safe": 0.7, "spans": []}} for row in rows()]
    with caplog.at_level(logging.WARNING, "safeshape"):
        run(tmp_path / "a", tokenizer, InertAlarm(patience=2), data=flat)
    said = [record.message for record in caplog.records if "have been equal" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 2: the cross-entropy weights of all tokens have been equal for 2 steps")
    with pytest.raises(RuntimeError, match="step 4: the cross-entropy weights"):
        run(tmp_path / "b", tokenizer, InertAlarm(patience=4, action="error"), data=flat)


def test_listening_does_not_change_the_training(tmp_path, tokenizer):
    plain = make(tmp_path / "a", tokenizer)
    plain.train()
    heard = make(tmp_path / "b", tokenizer)
    InertAlarm().attach(heard)
    heard.train()
    for one, two in zip(plain.model.parameters(), heard.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert heard.record()["policy"] == plain.record()["policy"]


def test_a_policy_of_ones_own_is_heard_too(tmp_path, tokenizer):
    def mine(p_safe_BT, *, batch, scale=1.0):
        return Weights(ce_BT=torch.full_like(p_safe_BT, scale), kl_BT=torch.zeros_like(p_safe_BT))

    assert fired(tmp_path, tokenizer, policy={"name": mine, "scale": 0.5}) == ["equal_weights"]


def test_nothing_is_said_of_weights_that_were_never_asked_for(tmp_path, tokenizer):
    def elsewhere(trainer):  # as a defence's stepper does: gradients that no policy weighs
        trainer.policy = replace(trainer.policy, function=POLICIES["star"])

    alarm = InertAlarm(patience=3)
    run(tmp_path, tokenizer, alarm, prepare=elsewhere)
    assert alarm.fired == []


def test_bad_settings():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        InertAlarm(patience=0)
    with pytest.raises(ValueError, match="action must be warn or error"):
        InertAlarm(action="ignore")
