"""Stored reference states: the right ones, exact to their precision, whole after a kill, and no reference left."""

import json

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from training import lora, losses, make, parameters, rows

from safeshape.models.states import StateCache, batches_by_length, split_into_shards

SGD = {"optim": "sgd", "max_steps": 6}


def test_shards_hold_whole_rows():
    shards = split_into_shards([3, 5, 0, 4, 9, 1], bytes_per_token=10, shard_bytes=80)
    assert [(s.first_row, s.last_row, s.start, s.end) for s in shards] == [
        (0, 3, 0, 8),
        (3, 4, 8, 12),
        (4, 5, 12, 21),
        (5, 6, 21, 22),
    ]
    assert split_into_shards([], 10, 80) == ()


def test_batches_by_length_respect_their_size():
    lengths = [10, 2, 30, 3, 2]
    batches = list(batches_by_length(range(5), lengths, 12))
    assert batches == [[1, 4, 3], [0], [2]]
    assert list(batches_by_length([], lengths, 12)) == []


def test_gather_reads_any_places_across_shards(tmp_path):
    cache = StateCache(tmp_path, key="k" * 64, tokens_per_row=[2, 3, 4], hidden=5, dtype="float32", shard_bytes=60)
    cache.prepare()
    assert len(cache.shards) == 3
    truth = torch.randn(9, 5)
    for shard in cache.shards:
        cache.write(shard, truth[shard.start : shard.end])
    places = torch.tensor([8, 0, 4, 4, 2])
    assert torch.equal(cache.gather(places), truth[places])
    assert cache.gather(places[:0]).shape == (0, 5)
    assert cache.bytes == 9 * 5 * 4
    with pytest.raises(ValueError, match="shard 0 holds 2 states of 5 channels"):
        cache.write(cache.shards[0], truth)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("policy", ["star", "adaptive", {"name": "fixed_kl", "divergence": "k3"}])
def test_stored_states_give_the_live_references_losses(tmp_path, tokenizer, adapter, policy):
    options = {"peft_config": lora()} if adapter else {}
    live, cached = (
        make(tmp_path / kind, tokenizer, policy=policy, reference=kind, settings=SGD, **options)
        for kind in ("adapter_off" if adapter else "copy", "cached")
    )
    live.train()
    cached.train()
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert (parameters(cached.model) - parameters(live.model)).abs().max() < 1e-5
    assert live.state.log_history[-2]["kl"] > 1e-4


def test_no_forward_of_the_reference_once_its_states_are_stored(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, reference="cached", settings=SGD)
    trainer._open_store()
    trainer._start()
    calls = []
    trainer.model.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 6  # one a step, the policy's own
    again = make(tmp_path, tokenizer, reference="cached", settings=SGD)
    again._open_store()
    assert again.reference.cache.missing() == []


def test_a_store_that_a_kill_cut_short_is_completed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("safeshape.caching.SHARD_BYTES", 1500)
    whole = make(tmp_path / "a", tokenizer, reference="cached", settings=SGD)
    whole.train()
    cache = whole.reference.cache
    assert len(cache.shards) > 3
    part = cache.path(cache.shards[1])
    kept = cache.path(cache.shards[2]).read_bytes()
    part.with_name(part.name + ".part").write_bytes(part.read_bytes()[:50])
    part.unlink()
    again = make(
        tmp_path / "b", tokenizer, reference="cached", settings=SGD, cache_dir=tmp_path / "a/_reference_states"
    )
    runs = []
    again.model.model.register_forward_hook(lambda *_: runs.append(1))
    again.train()
    assert cache.path(cache.shards[2]).read_bytes() == kept
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)


def test_another_model_other_data_or_another_precision_gets_a_store_of_its_own(tmp_path, tokenizer):
    folders = set()
    for options in (
        {},
        {"model": tiny_model(seed=1)},
        {"data": rows(8, seed=1)},
        {"eval_dataset": Dataset.from_list(rows(4, seed=3))},
        {"eval_dataset": Dataset.from_list(rows(4, seed=4))},
        {"cache_dtype": "bfloat16"},
    ):
        trainer = make(tmp_path, tokenizer, reference="cached", settings=SGD, **options)
        trainer._open_store()
        folders.add(trainer.reference.cache.folder)
    assert len(folders) == 6
    rescored = rows(8)
    for row in rescored:
        row["safety"] = {"signal": "test", "p_safe": 0.5, "spans": []}
    again = make(tmp_path, tokenizer, reference="cached", settings=SGD, data=rescored)
    again._open_store()
    assert again.reference.cache.folder in folders
    about = json.loads((trainer.reference.cache.folder / "states.json").read_text())
    assert about["dtype"] == "torch.bfloat16"
    assert trainer.reference.cache.folder.parent == tmp_path / "_reference_states"


def test_evaluation_rows_are_stored_too_and_unknown_ones_are_refused(tmp_path, tokenizer):
    held_out = Dataset.from_list(rows(4, seed=3))
    values = []
    for reference in ("copy", "cached"):
        trainer = make(tmp_path / reference, tokenizer, reference=reference, eval_dataset=held_out, settings=SGD)
        before = trainer.evaluate()
        trainer.train()
        values.append((before["eval_loss"], trainer.evaluate()["eval_loss"]))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[0][0] != pytest.approx(values[0][1], rel=1e-3)
    with pytest.raises(ValueError, match="has no states for these rows"):
        trainer.evaluate(Dataset.from_list(rows(4, seed=4)))


def test_an_adapter_answers_for_rows_that_are_not_stored(tmp_path, tokenizer):
    fresh = Dataset.from_list(rows(4, seed=4))
    values = []
    for reference in ("adapter_off", "cached"):
        trainer = make(tmp_path / reference, tokenizer, reference=reference, peft_config=lora(), settings=SGD)
        trainer.train()
        values.append(trainer.evaluate(fresh)["eval_loss"])
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_a_stream_has_no_store(tmp_path, tokenizer):
    from safeshape import SafeTrainer

    data = Dataset.from_list(rows()).to_iterable_dataset()
    from training import config

    with pytest.raises(ValueError, match="a stream has none"):
        SafeTrainer(tiny_model(), config(tmp_path), train_dataset=data, processing_class=tokenizer, reference="cached")


def test_resume_finds_the_states_of_the_starting_model(tmp_path, tokenizer):
    settings = SGD | {"save_strategy": "steps", "save_steps": 3}
    whole = make(tmp_path / "a", tokenizer, reference="cached", settings=settings)
    whole.train()
    half = make(tmp_path / "b", tokenizer, reference="cached", settings=settings | {"max_steps": 3})
    half.train()
    rest = make(tmp_path / "b", tokenizer, reference="cached", settings=settings)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-6)
    assert torch.equal(parameters(rest.model), parameters(whole.model))
