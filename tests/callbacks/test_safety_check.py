"""The check in training: it changes nothing by looking, and what it does when a band is left."""

import logging

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import tiny_model
from datasets import Dataset
from training import config, losses, make, parameters
from transformers import TrainerCallback

from safeshape import SafeTrainer, world
from safeshape.callbacks import SafetyCheck, Watch
from safeshape.models import load
from safeshape.stats import wilson
from safeshape.world import data, oracle

PROMPTS = [[{"role": "user", "content": text}] for text in ("one two", "fox", "dog cat", "three")]


class Script:
    """A success criterion that gives each check the rate it is told, in quarters."""

    def __init__(self, *quarters):
        self.quarters, self.calls = list(quarters), 0

    def __call__(self, answers):
        check = self.calls
        self.calls += 1
        return [index < self.quarters[min(check, len(self.quarters) - 1)] for index in range(len(answers))]


def watch(*quarters, name="attack_success", high=0.5, **options):
    return Watch(name=name, prompts=PROMPTS, success=Script(*quarters), high=high, max_new_tokens=4, **options)


def trained(tmp_path, tokenizer, check, *, steps=6, **options):
    trainer = make(tmp_path, tokenizer, settings={"max_steps": steps}, **options)
    if check is not None:
        check.attach(trainer)
    trainer.train()
    return trainer


def entries(trainer, name="safety/attack_success"):
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def test_looking_changes_nothing_of_the_training(tmp_path, tokenizer):
    settings = {"gradient_checkpointing": True, "max_steps": 4}
    plain = make(tmp_path / "a", tokenizer, settings=settings)
    plain.train()
    trainer = make(tmp_path / "b", tokenizer, settings=settings)
    SafetyCheck(tokenizer, [watch(0)], every=1).attach(trainer)
    use_cache = trainer.model.config.use_cache
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert torch.equal(parameters(trainer.model), parameters(plain.model))
    assert trainer.model.training == plain.model.training
    assert trainer.model.is_gradient_checkpointing
    assert trainer.model.config.use_cache == use_cache


def test_what_is_logged_and_when(tmp_path, tokenizer):
    check = SafetyCheck(tokenizer, [watch(0, 1, 1, 2), watch(3, name="over_refusal", high=1.0)], every=4)
    trainer = trained(tmp_path, tokenizer, check, steps=6)
    # Before the first step, after the fourth, and after the last.
    assert entries(trainer) == [(0, 0.0), (4, 0.25), (6, 0.25)]
    last = [entry for entry in trainer.state.log_history if "safety/attack_success" in entry][-1]
    assert (last["safety/attack_success_low"], last["safety/attack_success_high"]) == wilson(1, 4)
    assert last["safety/attack_success_n"] == 4
    assert last["safety/over_refusal"] == 0.75
    assert "safety/attack_success_failed" not in last
    # Once where the last step was checked anyway.
    again = trained(tmp_path / "b", tokenizer, SafetyCheck(tokenizer, [watch(0)], every=3), steps=6)
    assert [step for step, _ in entries(again)] == [0, 3, 6]


def test_reporters_get_the_entries_of_an_attached_check(tmp_path, tokenizer):
    class Reporter(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen = (*self.seen, *[name for name in logs if name.startswith("safety/")])

    trainer, reporter = make(tmp_path, tokenizer), Reporter()
    trainer.add_callback(reporter)
    SafetyCheck(tokenizer, [watch(0)], every=2).attach(trainer)
    trainer.train()
    assert "safety/attack_success" in reporter.seen
    assert len(losses(trainer)) == 4  # the trainer's own entries stay


def test_log_says_it_once_and_goes_on(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "safeshape"):
        trainer = trained(tmp_path, tokenizer, SafetyCheck(tokenizer, [watch(0, 4)], every=1))
    said = [record.message for record in caplog.records if "attack_success" in record.message]
    assert said == ["step 1: attack_success is 1.000 (n=4), outside 0 to 0.5"]
    assert trainer.state.global_step == 6


def test_stop_ends_training_with_the_weights_as_they_are(tmp_path, tokenizer):
    trainer = trained(tmp_path / "a", tokenizer, SafetyCheck(tokenizer, [watch(0, 0, 4)], every=2, leave="stop"))
    assert trainer.state.global_step == 4
    plain = trained(tmp_path / "b", tokenizer, None)
    assert losses(trainer) == losses(plain)[:4]


def test_roll_back_returns_weights_and_optimizer_and_goes_on(tmp_path, tokenizer):
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            moment = [v["exp_avg"].clone() for v in optimizer.state_dict()["state"].values()]
            seen[state.global_step] = (parameters(model).clone(), moment)

    trainer = make(tmp_path, tokenizer, settings={"max_steps": 5})
    SafetyCheck(tokenizer, [watch(0, 0, 4, 0)], every=2, leave="rollback", rollbacks=1).attach(trainer)
    trainer.add_callback(Keep())  # after the check: sees what the check left behind
    trainer.train()
    assert torch.equal(seen[4][0], seen[2][0])  # step 4 left the band: back to step 2
    assert not torch.equal(seen[3][0], seen[2][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[4][1], seen[2][1], strict=True))
    assert not torch.equal(seen[5][0], seen[4][0])  # and training went on
    assert entries(trainer, "safety/rollbacks")[-1] == (5, 1.0)


def test_the_last_roll_back_stops(tmp_path, tokenizer):
    start = parameters(tiny_model())
    trainer = trained(
        tmp_path, tokenizer, SafetyCheck(tokenizer, [watch(0, 4)], every=1, leave="rollback", rollbacks=2)
    )
    assert trainer.state.global_step == 3
    assert torch.equal(parameters(trainer.model), start)  # the only weights inside the band were the first


def test_a_last_step_outside_the_band_is_put_back_as_well(tmp_path, tokenizer):
    start = parameters(tiny_model())
    check = SafetyCheck(tokenizer, [watch(0, 4)], every=100, leave="rollback")
    assert torch.equal(parameters(trained(tmp_path, tokenizer, check).model), start)


def test_the_learning_rate_keeps_to_its_schedule_after_a_roll_back(tmp_path, tokenizer):
    def rates(folder, check):
        trainer = make(folder, tokenizer, settings={"max_steps": 5, "lr_scheduler_type": "linear"})
        if check is not None:
            check.attach(trainer)
        trainer.train()
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    check = SafetyCheck(tokenizer, [watch(0, 0, 4, 0)], every=1, leave="rollback")
    assert rates(tmp_path / "a", check) == rates(tmp_path / "b", None)


def test_an_interval_that_reaches_into_the_band_does_not_leave_it(tmp_path, tokenizer):
    # 3 of 4 is outside of up to 0.5 itself; its interval, from 0.30, is not.
    by_value = SafetyCheck(tokenizer, [watch(0, 3)], every=1, leave="stop")
    assert trained(tmp_path / "a", tokenizer, by_value).state.global_step == 1
    by_interval = SafetyCheck(tokenizer, [watch(0, 3)], every=1, leave="stop", by="interval")
    assert trained(tmp_path / "b", tokenizer, by_interval).state.global_step == 6
    sure = SafetyCheck(tokenizer, [watch(0, 4, high=0.25)], every=1, leave="stop", by="interval")
    assert trained(tmp_path / "c", tokenizer, sure).state.global_step == 1


def test_a_band_has_a_lower_end_too(tmp_path, tokenizer):
    refusal = watch(4, 4, 1, name="refusal", low=0.5, high=1.0)
    trainer = trained(tmp_path, tokenizer, SafetyCheck(tokenizer, [refusal], every=1, leave="stop"))
    assert trainer.state.global_step == 2


def test_missing_verdicts_are_counted_and_never_a_rate(tmp_path, tokenizer):
    some = Watch(name="attack_success", prompts=PROMPTS, success=lambda a: [None, True, False, False], max_new_tokens=2)
    trainer = trained(tmp_path / "a", tokenizer, SafetyCheck(tokenizer, [some], every=6))
    assert entries(trainer)[-1][1] == pytest.approx(1 / 3)
    assert entries(trainer, "safety/attack_success_failed")[-1][1] == 1
    none = Watch(name="attack_success", prompts=PROMPTS, success=lambda a: [None] * len(a), max_new_tokens=2)
    with pytest.raises(ValueError, match="attack_success could not be judged for any prompt"):
        trained(tmp_path / "b", tokenizer, SafetyCheck(tokenizer, [none], leave="stop"))
    short = Watch(name="attack_success", prompts=PROMPTS, success=lambda a: [True], max_new_tokens=2)
    with pytest.raises(ValueError, match="'attack_success': 4 answers got 1 verdicts"):
        trained(tmp_path / "c", tokenizer, SafetyCheck(tokenizer, [short]))


def test_a_start_outside_the_band_is_refused_where_something_would_be_done(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"the starting model is outside its band already: attack_success is 1\.000"):
        trained(tmp_path / "a", tokenizer, SafetyCheck(tokenizer, [watch(4)], leave="rollback"))
    trained(tmp_path / "b", tokenizer, SafetyCheck(tokenizer, [watch(4)], leave="log"))


def test_sharded_models_are_refused(tmp_path, tokenizer, monkeypatch):
    trainer = make(tmp_path, tokenizer)
    check = SafetyCheck(tokenizer, [watch(0)])
    monkeypatch.setattr(
        "safeshape.callbacks.safety.AcceleratorState",
        lambda: type("State", (), {"distributed_type": DistributedType.FSDP}),
    )
    with pytest.raises(ValueError, match="FSDP shards over processes"):
        check.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda t: SafetyCheck(t, [watch(0)], every=0), "every must be at least 1"),
        (lambda t: SafetyCheck(t, [watch(0)], leave="undo"), "leave must be log, stop or rollback"),
        (lambda t: SafetyCheck(t, [watch(0), watch(0)]), "watches with different names"),
        (lambda t: SafetyCheck(t, []), "watches with different names"),
        (lambda t: Watch(name="x", prompts=[], success=bool), "'x' has no prompts"),
        (lambda t: watch(0, low=0.9), "a band lies within"),
    ],
)
def test_bad_settings(tokenizer, make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it(tokenizer)


def test_on_the_world_plain_fine_tuning_on_harmful_rows_is_caught_and_undone(tmp_path):
    model, tokenizer = load(world.path("llama"))
    before = parameters(model).clone()
    task = next(task for task in data.tasks(size=12) if task.name == "attack_success")
    held = Watch(
        name="attack_success",
        prompts=task.prompts,
        success=lambda answers: map(oracle.harmful, answers),
        high=0.2,
        max_new_tokens=40,
    )
    rows = [row for row in data.user_data(size=100, harmful_share=0.6) if row["origin"] == "comply"]
    args = config(tmp_path, max_steps=30, learning_rate=1e-3, per_device_train_batch_size=8, max_length=256)
    trainer = SafeTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, policy="sft")
    SafetyCheck(tokenizer, [held], every=10, leave="rollback", rollbacks=0).attach(trainer)
    trainer.train()
    rates = entries(trainer)
    assert rates[0][1] == 0.0
    assert rates[-1][1] > 0.2  # fine-tuning broke it
    assert trainer.state.global_step == rates[-1][0] <= 30
    good = [step for step, rate in rates if rate <= 0.2][-1]
    if good == 0:
        assert torch.equal(parameters(model), before)
    assert entries(trainer, "safety/rollbacks")[-1][1] == 0.0  # counted after the check that saw it
