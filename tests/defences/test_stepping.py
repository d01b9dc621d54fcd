"""Whole optimisation batches, streams that depend on nothing but the step, and runs that go on after a stop."""

import json

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from defending import defend, harmful_rows, loop_of, safe_rows, weight
from training import config, lora, losses, make, parameters, rows

from safeshape.defences import DefendedTrainer, Stepper, resolve_defence
from safeshape.defences.records import Context
from safeshape.defences.stepping import gradients_of, indices_of_step, moved

BATCHED = {
    "lisa": {"align_steps": 1, "user_steps": 2, "warm_up": 0.0},
    "safe_grad": {},
    "asft": {},
    "antibody": {},
    "bds": {},
    "seal": {"epochs": 1},
    "ema": {"decay": 0.5},
    "booster": {"epochs": 0.5, "learning_rate": 1e-2},
    "vaccine": {"epochs": 0.5, "learning_rate": 1e-2},
    "t_vaccine": {"epochs": 0.5, "learning_rate": 1e-2, "layers": 1},
}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*((name, False) for name in sorted(BATCHED)), ("lisa", True), ("safe_grad", True), ("asft", True)],
)
def test_batch_4_equals_4_times_batch_1(tmp_path, tokenizer, name, adapter):
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        options = {"peft_config": lora()} if adapter else {}
        ended = defend(
            tmp_path, tokenizer, {"name": name, **BATCHED[name]}, settings={**settings, "max_steps": 3}, **options
        )
        found.append((losses(ended.trainer), parameters(ended.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-5
    if not adapter:
        assert (found[0][1] - parameters(tiny_model())).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["vaccine", "safe_grad", "bds"])
def test_checkpointed_activations_change_nothing(tmp_path, tokenizer, name):
    """TRL's default. Hooks run once more while activations are made again."""
    found = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "optim": "sgd", "max_steps": 3}
        ended = defend(tmp_path, tokenizer, {"name": name, **BATCHED[name]}, settings=settings)
        found.append(parameters(ended.model))
    assert (found[0] - found[1]).abs().max() < 1e-6


def trainer_with(folder, tokenizer, spec, *, settings=None, model=None):
    defence = resolve_defence(spec)
    args = config(folder, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **(settings or {})})
    data = Dataset.from_list(rows())
    context = Context(tokenizer=tokenizer, args=args, user_data=data)
    return DefendedTrainer(
        tiny_model() if model is None else model,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        policy=defence.policy,
        stepper=defence.stepper(context),
        safe_data=safe_rows(),
        harmful_data=harmful_rows(),
        defence={"name": defence.name, **defence.parameters},
    )


STATEFUL = {
    "lisa": {"align_steps": 1, "user_steps": 2, "warm_up": 0.0},
    "bds": {"learning_rate": 0.5},
    "ema": {"decay": 0.5},
    "t_vaccine": {"layers": 1, "every": 1, "probe_every": 100},
    "safe_grad": {},
}


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, tokenizer, name):
    spec = {"name": name, **STATEFUL[name]}
    whole = trainer_with(tmp_path, tokenizer, spec)
    whole.train()
    again = trainer_with(tmp_path, tokenizer, spec)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert len(losses(whole)) == 4
    for trainer in (whole, again):
        trainer.stepper.finish(trainer.model)
    assert torch.equal(parameters(again.model), parameters(whole.model))
    for key, value in whole.stepper.state().items():
        assert torch.equal(again.stepper.state()[key], value), key


def test_a_checkpoint_of_another_defence_or_other_safe_data_is_refused(tmp_path, tokenizer):
    trainer_with(tmp_path, tokenizer, {"name": "lisa", "rho": 1.0}).train()
    checkpoint = tmp_path / "checkpoint-2"
    for spec in ({"name": "lisa", "rho": 2.0}, "bds"):
        with pytest.raises(ValueError, match="its defence was"):
            trainer_with(tmp_path, tokenizer, spec).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "defence_state.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no defence_state"):
        trainer_with(tmp_path, tokenizer, {"name": "lisa", "rho": 1.0}).train(resume_from_checkpoint=str(checkpoint))
    record = json.loads((checkpoint / "safeshape.json").read_text())
    record["defence"]["safe_data"] = "0"
    (checkpoint / "safeshape.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="its defence was"):
        trainer_with(tmp_path, tokenizer, {"name": "lisa", "rho": 1.0}).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_plain_stepper_is_plain_fine_tuning(tmp_path, tokenizer, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    plain = make(tmp_path, tokenizer, policy="sft", settings=settings)
    plain.train()
    stepped = DefendedTrainer(
        tiny_model(),
        config(tmp_path, **settings),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        policy="sft",
        stepper=Stepper(),
    )
    stepped.train()
    assert losses(stepped) == pytest.approx(losses(plain), rel=1e-6)
    assert (parameters(stepped.model) - parameters(plain.model)).abs().max() < 1e-6
    assert stepped.state.log_history[-2]["num_tokens"] == plain.state.log_history[-2]["num_tokens"]


class Twice(Stepper):
    """Half of the gradient, two times: plain fine-tuning that runs the user's rows more often than once."""

    def gradients(self, loop):
        losses = [loop.user(), loop.user()]
        for value in loop.parameters.values():
            value.grad = value.grad / 2
        return sum(losses) / 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_that_a_stepper_runs_twice_are_logged_once(tmp_path, tokenizer, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "logging_steps": 2}
    policy = {"name": "star", "kl": 0.5}
    logs = []
    for stepper in (None, Twice()):
        trainer = DefendedTrainer(
            tiny_model(),
            config(tmp_path, **settings),
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
            policy=policy,
            stepper=stepper,
        )
        sums = []
        take = trainer._means.take
        trainer._means.take = lambda mode, reduce, m=trainer._means, t=take, s=sums: (
            s.append(float(m._sums[mode].get("tokens", 0.0))), t(mode, reduce))[1]  # fmt: skip
        trainer.train()
        logs.append((trainer.state.log_history, sums))
    (plain, counted), (twice, counted_twice) = logs
    assert counted_twice == counted
    for name in ("ce", "kl", "ce_weight", "kl_weight", "num_tokens", "risk_hist/0.0"):
        assert [entry[name] for entry in twice[:-1]] == pytest.approx([entry[name] for entry in plain[:-1]], rel=1e-4)


def test_tokens_are_counted_whatever_loss_the_rows_are_run_under(tmp_path, tokenizer):
    """BDS and SafeGrad see every row of the user's; Lisa's alignment steps pass the user's batch over."""
    seen = {}
    for name, more in (("sft", {}), ("bds", {}), ("safe_grad", {}), ("lisa", {"align_steps": 2, "user_steps": 2})):
        found = defend(tmp_path, tokenizer, {"name": name, **more}, settings={"max_steps": 4})
        seen[name] = [entry["num_tokens"] for entry in found.trainer.state.log_history[:4]]
    assert seen["bds"] == seen["safe_grad"] == seen["sft"]
    assert seen["lisa"][:2] == [0, 0]
    assert seen["lisa"][3] == seen["sft"][3] - seen["sft"][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "does not support packing"),
        ({"padding_free": True, "max_length": None}, "does not support packing"),
        ({"shuffle_dataset": True}, "does not support shuffle_dataset"),
    ],
)
def test_settings_that_hide_rows_are_refused(tmp_path, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, tokenizer, "ema", settings=settings)


def test_each_pass_over_a_stream_takes_every_row_once_in_an_order_of_its_own():
    first = [i for step in range(2) for i in indices_of_step(6, 3, step, 0)]
    second = [i for step in range(2, 4) for i in indices_of_step(6, 3, step, 0)]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert indices_of_step(6, 4, 1, 0) == [*first[4:], *second[:2]]  # a batch over the edge of two passes
    assert [i for step in range(2) for i in indices_of_step(6, 3, step, 1)] != first


def test_gradients_are_taken_without_touching_those_that_are_there():
    w = weight(3.0)
    w.grad = torch.tensor([7.0])
    loop = loop_of(w, user=lambda w: (w**2).sum())
    found, loss = gradients_of(loop, loop.user)
    assert (found["w"].item(), loss.item(), w.grad.item()) == (6.0, 9.0, 7.0)
    with moved(loop, {"w": torch.tensor([0.1])}):
        assert w.item() == pytest.approx(3.1)
    assert w.item() == 3.0
