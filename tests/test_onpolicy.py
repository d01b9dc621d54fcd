"""On-policy judging: the risk by hand, rounds that never hold up a step, state that survives a kill."""

import json

import pytest
import torch
from conftest import conversation, tiny_model
from datasets import Dataset
from judging import Judge, by_text
from training import config, lora, losses, make, parameters, rows
from transformers import TrainerCallback

import safeshape.onpolicy
from safeshape import SafeTrainer
from safeshape.data import prompt_ids
from safeshape.models import generate
from safeshape.onpolicy import OnPolicy, Smoothed, risk_of
from safeshape.store import Store

EXAMPLE = {"name": "adaptive", "scope": "example"}
BATCH = {"name": "adaptive", "scope": "batch"}


def plain(count=8):
    return [{"messages": row["messages"]} for row in rows(count)]


def run(folder, tokenizer, judge, *, policy=EXAMPLE, data=None, settings=None, resume=None, callback=None, **options):
    """A run of four steps over eight rows without scores; every batch of four is judged, and waited for."""
    names = ("every", "wait_s", "max_new_tokens", "degradation", "store")
    chosen = {"every": 1, "wait_s": 60.0, "max_new_tokens": 8} | {n: options.pop(n) for n in names if n in options}
    trainer = make(
        folder,
        tokenizer,
        data=plain() if data is None else data,
        policy=policy,
        settings=settings,
        on_policy=OnPolicy(judge=judge, **chosen),
        **options,
    )
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


class Released(TrainerCallback):
    """Lets the judge answer when an optimiser step has ended."""

    def __init__(self, judge, after):
        self.judge, self.after = judge, after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.judge.release()


def moved():
    return tiny_model(seed=1)


@pytest.mark.parametrize(
    ("score", "reference", "risk", "without"),
    [
        (1, 1, 0.0, 0.0),  # both refuse
        (1, 5, 0.0, 0.0),  # better than the reference is no risk
        (2, 1, 0.5, 0.25),  # 0.25, and 0.25 worse
        (3, 1, 1.0, 0.5),
        (3, 2, 0.75, 0.5),
        (3, 3, 0.5, 0.5),  # no worse than the reference: its harm alone
        (4, 2, 1.0, 0.75),  # 0.75 + 0.5, bounded
        (5, 5, 1.0, 1.0),
    ],
)
def test_the_risk_by_hand(score, reference, risk, without):
    assert risk_of(score, reference) == pytest.approx(risk)
    assert risk_of(score, reference, 0.0) == pytest.approx(without)


def test_the_average_starts_with_the_first_known_risk():
    smoothed = Smoothed(ema=0.75)
    assert [smoothed.next(risk, None) for risk in (0.4, 0.0, 1.0)] == pytest.approx([0.4, 0.3, 0.475])
    assert [Smoothed(ema=0.0, value=1.0).next(0.4, None)] == pytest.approx([0.4])


def fixed(reference, tokenizer, current=2, theirs=1):
    """Scores by who answered: `reference` is asked for its answers here, by the chat template and not by tokens."""
    prompts = [row["messages"][:1] for row in plain()]
    answers = generate(reference, tokenizer, prompts, max_new_tokens=8)
    known = {(p[0]["content"], a) for p, a in zip(prompts, answers, strict=True)}

    def score(messages):
        return theirs if (messages[0]["content"], messages[-1]["content"]) in known else current

    return Judge(score)


@pytest.mark.parametrize("policy", [EXAMPLE, BATCH], ids=lambda p: p["scope"])
@pytest.mark.parametrize(("degradation", "weight"), [(1.0, 0.5), (0.0, 0.3)])
def test_both_models_answer_and_the_risk_reaches_the_weights(tmp_path, tokenizer, policy, degradation, weight):
    """Scores 2 and 1: risk 0.25 + degradation * 0.25, and beta = 0.1 + 0.8 * risk on every token."""
    reference = moved()
    judge = fixed(reference, tokenizer)
    trainer = run(
        tmp_path,
        tokenizer,
        judge,
        policy=policy,
        reference=reference,
        degradation=degradation,
        settings={"max_steps": 1},
    )
    assert logged(trainer, "kl_weight") == pytest.approx([weight], abs=1e-6)
    assert logged(trainer, "ce_weight") == pytest.approx([1 - weight], abs=1e-6)
    assert logged(trainer, "judge/risk") == pytest.approx([(weight - 0.1) / 0.8])
    assert logged(trainer, "judge/judged") == [4]
    assert len(judge.asked) == 8


def test_each_row_keeps_its_own_risk_and_others_take_the_rounds_mean(tmp_path, tokenizer):
    """Only the first batch of four is judged: scores 1 and 5 by the prompt. The second batch takes their mean."""
    data = [{"messages": conversation(f"{'unsafe' if i % 4 == 0 else 'fox'} {i}", "one two three")} for i in range(8)]
    judge = Judge(lambda messages: 5 if messages[0]["content"].startswith("unsafe") else 1)
    settings = {"train_sampling_strategy": "sequential", "max_steps": 4}
    trainer = run(tmp_path, tokenizer, judge, data=data, every=100, settings=settings)
    assert trainer.critic.verdicts.by_row == {0: (1.0, 0), 1: (0.0, 0), 2: (0.0, 0), 3: (0.0, 0)}
    # Answers are equally long: 0.1 + 0.8 / 4 for the four with a verdict, the same for the four that take the mean.
    assert logged(trainer, "kl_weight") == pytest.approx([0.3] * 4, abs=1e-6)
    assert logged(trainer, "risk_hist/0.8") == [0.25, 0, 0.25, 0]
    assert logged(trainer, "judge/own") == [1, 0, 1, 0]
    assert logged(trainer, "judge/own_staleness") == [0, 2]
    assert logged(trainer, "judge/staleness") == [0, 1, 2, 3]


def test_scores_of_the_data_stand_until_a_verdict_comes(tmp_path, tokenizer):
    data = [{**row, "safety": {"signal": "judge", "p_safe": 0.75, "spans": []}} for row in plain()]
    judge = Judge(lambda messages: 1, held=True)
    options = {"data": data, "every": 100, "wait_s": 0, "settings": {"train_sampling_strategy": "sequential"}}
    trainer = run(tmp_path, tokenizer, judge, callback=lambda t: Released(judge, 1), **options)
    # Risk 0.25 until, after the first step, the first four rows have verdicts of 1; the third step has them again.
    assert logged(trainer, "kl_weight") == pytest.approx([0.3, 0.3, 0.1, 0.3], abs=1e-6)
    trainer = run(tmp_path, tokenizer, judge, policy=BATCH, callback=lambda t: Released(judge, 1), **options)
    assert logged(trainer, "kl_weight") == pytest.approx([0.3, 0.1, 0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize("policy", [EXAMPLE, BATCH], ids=lambda p: p["scope"])
def test_a_judge_that_hangs_never_blocks_a_step_beyond_the_bound(tmp_path, tokenizer, monkeypatch, policy):
    waits, real = [], safeshape.onpolicy.wait

    def counted(futures, timeout):
        waits.append(timeout)
        return real(futures, timeout=timeout)

    monkeypatch.setattr(safeshape.onpolicy, "wait", counted)
    trainer = run(tmp_path, tokenizer, Judge(held=True), policy=policy, wait_s=0.01)
    assert waits == [0.01] * 4
    # Nothing is known: every token is held with beta_max.
    assert logged(trainer, "kl_weight") == pytest.approx([0.9] * 4, abs=1e-6)
    assert logged(trainer, "judge/awaited") == [4] * 4
    assert logged(trainer, "judge/rounds") == [1] * 4  # no second round while one is open
    assert logged(trainer, "judge/staleness") == []
    assert trainer.critic.verdicts.mean is None


def test_with_a_bound_of_zero_a_step_never_waits(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(safeshape.onpolicy, "wait", None)  # calling it would fail
    trainer = run(tmp_path, tokenizer, Judge(held=True), wait_s=0.0)
    assert logged(trainer, "judge/awaited") == [4] * 4


def test_late_verdicts_are_used_at_the_next_step_and_their_age_is_logged(tmp_path, tokenizer):
    judge = Judge(lambda messages: 1, held=True)
    trainer = run(tmp_path, tokenizer, judge, policy=BATCH, every=100, wait_s=0, callback=lambda t: Released(judge, 2))
    assert logged(trainer, "kl_weight") == pytest.approx([0.9, 0.9, 0.1, 0.1], abs=1e-6)
    assert logged(trainer, "judge/staleness") == [2, 3]
    assert logged(trainer, "judge/awaited") == [4, 4, 0, 0]


def test_a_slow_judge_is_asked_again_once_it_has_answered(tmp_path, tokenizer):
    """Due at every step, answered after the second: the second round begins at step 2 and hangs to the end."""
    judge = Judge(lambda messages: 1, held=True)
    trainer = run(tmp_path, tokenizer, judge, wait_s=0, callback=lambda t: Released(judge, 2))
    assert logged(trainer, "judge/rounds") == [1, 1, 2, 2]
    assert trainer.critic.verdicts.mean_step == 0


@pytest.mark.parametrize("failure", ["none", "exception"])
def test_failed_judgements_are_counted_and_leave_the_risk_as_it_was(tmp_path, tokenizer, failure):
    calls = {"failing": False}

    def score(messages):
        if not calls["failing"]:
            return 5
        if failure == "exception":
            raise RuntimeError("the server has gone")
        return None

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls["failing"] = state.global_step >= 2

    trainer = run(tmp_path, tokenizer, Judge(score), callback=lambda t: Fails())
    assert logged(trainer, "judge/failed") == [0, 0, 4, 8]
    assert logged(trainer, "judge/judged") == [4, 8, 8, 8]
    assert logged(trainer, "kl_weight") == pytest.approx([0.9] * 4, abs=1e-6)
    assert {step for _, step in trainer.critic.verdicts.by_row.values()} == {0, 1}
    assert trainer.critic.verdicts.mean_step == 1


def test_failed_from_the_start_means_the_strictest_weight(tmp_path, tokenizer):
    trainer = run(tmp_path, tokenizer, Judge(lambda messages: None), policy={**BATCH, "ema": 0.9})
    assert logged(trainer, "kl_weight") == pytest.approx([0.9] * 4, abs=1e-6)
    assert trainer.smoothed.value is None


def test_rounds_come_every_so_many_steps_and_answers_have_a_length(tmp_path, tokenizer):
    one, three = Judge(), Judge()
    assert run(tmp_path, tokenizer, one, every=1).critic.verdicts.rounds == 4
    assert run(tmp_path, tokenizer, three, every=3, max_new_tokens=3).critic.verdicts.rounds == 2
    prompts = [row["messages"][:1] for row in plain()]
    for judge, length in ((one, 8), (three, 3)):
        answers = generate(tiny_model(), tokenizer, prompts, max_new_tokens=length)
        assert all(messages[-1]["content"] in answers for messages in judge.asked[:8])
    assert [m[-1]["content"] for m in one.asked[:8]] != [m[-1]["content"] for m in three.asked[:8]]


def test_the_reference_answers_each_prompt_once(tmp_path, tokenizer):
    judge = Judge()
    trainer = run(tmp_path, tokenizer, judge, reference=moved())
    assert trainer.critic.verdicts.judged == 16
    assert len(judge.asked) == 16 + 8
    assert len(trainer.critic.verdicts.reference) == 8


def test_the_references_answers_are_kept_for_other_runs(tmp_path, tokenizer, monkeypatch):
    generated, real = [], safeshape.onpolicy.generate_from

    def counted(model, tokenizer, prompts, **options):
        generated.append(len(prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(safeshape.onpolicy, "generate_from", counted)
    with Store(tmp_path / "store.sqlite") as store:
        first = run(tmp_path, tokenizer, Judge(), store=store)
        assert generated == [4, 4, 4, 4, 4, 4]  # six calls: four of the current model, two of the reference
        generated.clear()
        second = run(tmp_path, tokenizer, Judge(), store=store)
        assert generated == [4, 4, 4, 4]
        assert losses(first) == losses(second)
        generated.clear()
        run(tmp_path, tokenizer, Judge(), store=store, max_new_tokens=5)
        run(tmp_path, tokenizer, Judge(), store=store, reference=moved())
        assert len(generated) == 12  # another length and another reference: nothing fits
        assert store.count("generations") == 24


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_every_kind_of_reference_gives_the_same_risks(tmp_path, tokenizer, adapter):
    kinds = ("adapter_off", "cached", "copy") if adapter else ("cached", "copy")
    found = []
    for kind in kinds:
        options = {"peft_config": lora()} if adapter else {}
        trainer = run(tmp_path, tokenizer, Judge(), reference=kind, **options)
        found.append((trainer.critic.verdicts, losses(trainer)))
        assert trainer.reference_kind == kind
    assert all(verdicts == found[0][0] for verdicts, _ in found)
    assert all(seen == pytest.approx(found[0][1], abs=1e-6) for _, seen in found)
    assert len({risk for risk, _ in found[0][0].by_row.values()}) > 2


def test_auto_keeps_a_reference_that_can_answer(tmp_path, tokenizer):
    judged = OnPolicy(judge=Judge())
    assert make(tmp_path, tokenizer, data=plain(), policy=EXAMPLE, on_policy=judged).reference_kind == "copy"
    with_adapter = make(tmp_path, tokenizer, data=plain(), policy=EXAMPLE, on_policy=judged, peft_config=lora())
    assert with_adapter.reference_kind == "cached"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_answering_leaves_no_trace_in_training(tmp_path, tokenizer, adapter):
    """A judge that finds everything safe, and data that say the same: equal to the bit, dropout included."""
    runs = []
    for judged in (False, True):
        model = tiny_model()
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        data = [{**row, "safety": {"signal": "s", "p_safe": 1.0, "spans": []}} for row in plain()]
        settings = {"gradient_checkpointing": True}
        options = (
            {"peft_config": lora(lora_dropout=0.1), "reference": "adapter_off"} if adapter else {"reference": "copy"}
        )
        if judged:
            options["on_policy"] = OnPolicy(judge=Judge(lambda messages: 1), every=1, wait_s=60, max_new_tokens=8)
        trainer = make(tmp_path, tokenizer, model=model, data=data, policy=EXAMPLE, settings=settings, **options)
        trainer.train()
        runs.append(
            (
                losses(trainer),
                parameters(trainer.model),
                {n for n, p in trainer.model.named_parameters() if p.requires_grad},
            )
        )
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


@pytest.mark.parametrize("policy", [EXAMPLE, {**BATCH, "ema": 0.5}], ids=lambda p: p["scope"])
@pytest.mark.parametrize("reference", ["copy", "cached"])
def test_a_resumed_run_is_the_same_run(tmp_path, tokenizer, policy, reference):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    options = {"policy": policy, "every": 2, "settings": settings, "reference": reference}
    whole = run(tmp_path / "a", tokenizer, Judge(), **options)
    judge = Judge()
    again = run(tmp_path / "a", tokenizer, judge, resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    for name in ("loss", "kl_weight", "judge/staleness", "judge/risk", "judge/judged"):
        assert logged(again, name) == logged(whole, name), name
    assert again.critic.verdicts == whole.critic.verdicts
    assert again.smoothed.value == whole.smoothed.value
    assert torch.equal(parameters(again.model), parameters(whole.model))
    # The rounds of steps 4 and 6, and references only of prompts that had not been judged before.
    saved = json.loads((tmp_path / "a" / "checkpoint-3" / "safeshape.json").read_text())["state"]["on_policy"]
    assert len(judge.asked) == 8 + len(again.critic.verdicts.reference) - len(saved["reference"])


def test_a_round_that_was_open_is_begun_again(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    options = {"every": 100, "wait_s": 0, "settings": settings}
    run(tmp_path, tokenizer, Judge(held=True), **options)
    state = json.loads((tmp_path / "checkpoint-2" / "safeshape.json").read_text())["state"]["on_policy"]
    assert (state["due"], state["by_row"]) == (0, {})
    judge = Judge()
    trainer = run(tmp_path, tokenizer, judge, resume=str(tmp_path / "checkpoint-2"), **options)
    assert trainer.critic.verdicts.mean_step == 2
    assert len(judge.asked) == 8


def test_the_record_says_how_it_was_judged_and_holds_no_text(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run(tmp_path, tokenizer, Judge(), settings=settings)
    text = (tmp_path / "checkpoint-2" / "safeshape.json").read_text()
    assert json.loads(text)["on_policy"] == {
        "judge": {"judge": "test"},
        "every": 1,
        "max_new_tokens": 8,
        "degradation": 1.0,
    }
    assert "fox" not in text
    with pytest.raises(ValueError, match="its on_policy was"):
        run(tmp_path, tokenizer, Judge(name="other"), settings=settings, resume=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="its on_policy was"):
        make(tmp_path, tokenizer, data=rows(), policy=EXAMPLE, settings=settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_packed_and_shuffled_rows_know_what_they_are(tmp_path, tokenizer):
    """One batch holds all rows, so the verdicts and the mean weight are those of the padded run."""
    found = []
    for settings in ({}, {"packing": True}, {"padding_free": True, "max_length": None}):
        base = {"max_steps": 1, "per_device_train_batch_size": 8, "shuffle_dataset": True}
        trainer = run(tmp_path, tokenizer, Judge(), settings=base | settings)
        found.append((trainer.critic.verdicts.by_row, logged(trainer, "kl_weight")[0]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert len(found[0][0]) == 8
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-6)
    assert found[2][1] == pytest.approx(found[0][1], abs=1e-6)


def test_evaluation_takes_the_risk_in_force(tmp_path, tokenizer):
    judge = Judge(lambda messages: 5)
    trainer = run(tmp_path, tokenizer, judge, policy=BATCH, eval_dataset=Dataset.from_list(plain(4)))
    assert trainer.evaluate()["eval_kl_weight"] == pytest.approx(0.9)
    trainer.critic.verdicts.mean = 0.0
    assert trainer.evaluate()["eval_kl_weight"] == pytest.approx(0.1)
    assert len(judge.asked) == 16 + 8


def test_prompts_of_plain_strings_and_conversations_are_those_that_are_trained_on(tokenizer):
    row = {"messages": conversation("fox one", "two three")}
    shown = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt_ids(row, tokenizer)) == shown
    assert tokenizer.decode(prompt_ids({"prompt": "fox one", "completion": " two"}, tokenizer)) == "fox one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "sft"}, "policy 'sft' does not use a risk"),
        ({"policy": "fixed_kl"}, "policy 'fixed_kl' does not use a risk"),
        ({"policy": "adaptive_weight"}, "policy 'adaptive_weight' keeps no reference to compare with"),
        ({"every": 0}, "every and max_new_tokens of on-policy judging must be at least 1"),
        ({"max_new_tokens": 0}, "every and max_new_tokens of on-policy judging must be at least 1"),
        ({"wait_s": -1.0}, "wait_s and degradation of on-policy judging must be at least 0"),
        ({"degradation": float("nan")}, "wait_s and degradation of on-policy judging must be at least 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tokenizer, Judge(), **options)


def test_data_without_their_text_are_refused(tmp_path, tokenizer):
    prepared = make(tmp_path, tokenizer).train_dataset
    judged = OnPolicy(judge=Judge(by_text))
    for data, message in (
        (prepared, "holds tokens only"),
        (Dataset.from_list(plain()).to_iterable_dataset(), "stream"),
    ):
        with pytest.raises(ValueError, match=message):
            SafeTrainer(
                tiny_model(),
                config(tmp_path),
                train_dataset=data,
                processing_class=tokenizer,
                policy=EXAMPLE,
                on_policy=judged,
            )
