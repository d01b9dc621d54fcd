"""Packing, padding-free batches and length grouping: the weights follow their tokens, and nothing else changes."""

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from training import config, lora, losses, make, parameters, rows

from safeshape import SafeTrainer
from safeshape.data import example_risk, micro_batch
from safeshape.policies import POLICIES

# All eight rows in one update, however they are laid out; SGD shows a gradient as it is.
WHOLE = {"optim": "sgd", "max_steps": 3, "per_device_train_batch_size": 8}
LAYOUTS = {
    "packed": {"packing": True, "max_length": 64, "per_device_train_batch_size": 8},
    "flat": {"padding_free": True, "max_length": None},
}


def spec(policy):
    return {"name": "adaptive", "scope": "batch", "ema": 0.5} if policy == "adaptive" else policy


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_packed_and_padding_free_runs_equal_padded_ones(tmp_path, tokenizer, layout, policy):
    padded = make(tmp_path / "a", tokenizer, policy=spec(policy), settings=WHOLE)
    other = make(tmp_path / "b", tokenizer, policy=spec(policy), settings=WHOLE | LAYOUTS[layout])
    if layout == "packed":
        assert len(other.train_dataset) < 8
        assert max(len(lengths) for lengths in other.train_dataset["seq_lengths"]) > 1
    padded.train()
    other.train()
    assert losses(other) == pytest.approx(losses(padded), rel=2e-5)
    assert (parameters(other.model) - parameters(padded.model)).abs().max() < 1e-5
    # TRL counts tokens alike; the mean weight says that no token got another's score.
    for name in ("num_tokens", "ce_weight", "kl_weight"):
        assert other.state.log_history[0][name] == pytest.approx(padded.state.log_history[0][name], rel=1e-5), name


@pytest.mark.parametrize("reference", ["adapter_off", "copy", "cached"])
@pytest.mark.parametrize("head", ["fused", "dense"])
def test_packing_with_every_reference_and_head(tmp_path, tokenizer, reference, head):
    options = {"reference": reference, "loss_head": head, "peft_config": lora()}
    padded = make(tmp_path / "a", tokenizer, settings=WHOLE, **options)
    packed = make(tmp_path / "b", tokenizer, settings=WHOLE | LAYOUTS["packed"], **options)
    padded.train()
    packed.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=2e-5)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "qwen3"])
def test_packing_on_other_architectures(tmp_path, tokenizer, kind):
    runs = []
    for layout in ({}, LAYOUTS["packed"]):
        model = tiny_model(kind)
        model.config.sliding_window = 8  # shorter than the rows
        trainer = make(tmp_path / str(len(runs)), tokenizer, model=model, settings=WHOLE | layout)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=2e-5)


def test_each_packed_example_keeps_its_own_risk_and_positions(tmp_path, tokenizer):
    padded = make(tmp_path / "a", tokenizer, settings=WHOLE)
    packed = make(tmp_path / "b", tokenizer, settings=WHOLE | LAYOUTS["packed"])
    batches = [t.data_collator(list(t.train_dataset)) for t in (padded, packed)]
    assert sorted(example_risk(batches[1]).tolist()) == pytest.approx(sorted(example_risk(batches[0]).tolist()))
    micro = [micro_batch(batch) for batch in batches]
    for name in ("position_BT", "p_safe_BT", "labels_BT"):
        values = [sorted(getattr(m, name)[m.counted_BT].tolist()) for m in micro]
        assert values[0] == pytest.approx(values[1]), name
    assert sorted(micro[1].cache_index_N.tolist()) == list(range(int(micro[0].counted_BT.sum())))


def test_a_padded_multiple_changes_nothing(tmp_path, tokenizer):
    plain = make(tmp_path / "a", tokenizer, settings=WHOLE)
    padded = make(tmp_path / "b", tokenizer, settings=WHOLE | {"pad_to_multiple_of": 16})
    flat = make(tmp_path / "c", tokenizer, settings=WHOLE | LAYOUTS["flat"] | {"pad_to_multiple_of": 16})
    for trainer in (plain, padded, flat):
        trainer.train()
    assert losses(padded) == pytest.approx(losses(plain), rel=2e-5)
    assert losses(flat) == pytest.approx(losses(plain), rel=2e-5)


def test_a_stream_can_be_packed(tmp_path, tokenizer):
    data = Dataset.from_list(rows())
    runs = []
    for train in (data, data.to_iterable_dataset()):
        settings = WHOLE | LAYOUTS["packed"] | {"shuffle_dataset": False, "train_sampling_strategy": "sequential"}
        trainer = SafeTrainer(
            tiny_model(),
            config(tmp_path, **settings),
            train_dataset=train,
            processing_class=tokenizer,
            reference="copy",
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=2e-5)


def test_grouping_by_length_pads_less_and_sees_the_same_rows(tmp_path, tokenizer):
    data = rows(64)
    settings = {"per_device_train_batch_size": 4, "max_steps": 16, "optim": "sgd", "learning_rate": 1e-9}
    seen = []
    for strategy in ("random", "group_by_length"):
        trainer = make(
            tmp_path / strategy,
            tokenizer,
            data=data,
            reference="copy",
            settings=settings | {"train_sampling_strategy": strategy},
        )
        widths = []
        trainer.model.model.register_forward_pre_hook(
            lambda _, __, kwargs, widths=widths: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        trainer._open_store()
        trainer._start()
        widths.clear()
        trainer.train()
        seen.append((sum(widths), trainer.state.log_history[-2]["num_tokens"]))
    assert seen[1][0] < seen[0][0]
    assert seen[1][1] == seen[0][1]


def test_cutting_rows_anywhere_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="packing_strategy='wrapped'"):
        make(tmp_path, tokenizer, settings={"packing": True, "packing_strategy": "wrapped"})


def test_rows_too_long_for_a_pack_are_refused_like_any_other(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="tokens, but max_length is 8"):
        make(tmp_path, tokenizer, settings={"packing": True, "max_length": 8})
    trainer = make(tmp_path, tokenizer, overlong="truncate", settings={"packing": True, "max_length": 20})
    assert all(len(ids) <= 20 for ids in trainer.train_dataset["input_ids"])
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()
