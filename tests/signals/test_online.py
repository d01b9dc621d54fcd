"""A probe read off the reference's own pass: the offline scores, and not one forward more."""

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from training import lora, losses, make, rows

from safeshape.data import prompt_spans
from safeshape.signals.column import score_dataset
from safeshape.signals.probes import Probe

SGD = {"optim": "sgd", "max_steps": 3}
WORDS = ["fox dog", "one two three", "cat and dog", "seven eight", "the quick brown fox", "nine ten"]


@pytest.fixture(params=["last", "mean"])
def probe(request, tokenizer):
    return Probe.fit(
        WORDS,
        [True, False] * 3,
        model=tiny_model(),
        tokenizer=tokenizer,
        layers=(0, 1, -1),
        pooling=request.param,
    )


def unscored():
    return [{"messages": row["messages"]} for row in rows()]


def test_prompt_spans_of_padded_and_flattened_rows():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, -100, 8, 9]])
    begins = torch.zeros_like(labels, dtype=torch.bool)
    assert prompt_spans(labels, begins) == [(0, 0, 2, 4), (1, 0, 3, 5)]
    flat = torch.tensor([[-100, 4, -100, -100, 5, 6, -100]])
    begins = torch.tensor([[1, 0, 1, 0, 0, 0, 1]]).bool()
    assert prompt_spans(flat, begins) == [(0, 0, 1, 2), (0, 2, 4, 6)]


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 64}], ids=["padded", "packed"])
@pytest.mark.parametrize("reference", ["adapter_off", "copy", "cached"])
def test_online_equals_offline(tmp_path, tokenizer, probe, reference, layout):
    scored = score_dataset(Dataset.from_list(unscored()), probe.score_many)
    options = {"policy": "adaptive", "reference": reference, "peft_config": lora(), "settings": SGD | layout}
    offline = make(tmp_path / "a", tokenizer, data=list(scored), **options)
    online = make(tmp_path / "b", tokenizer, data=unscored(), probe=probe, **options)
    offline.train()
    online.train()
    assert losses(online) == pytest.approx(losses(offline), rel=2e-5)
    weights = [[e["kl_weight"] for e in t.state.log_history if "kl_weight" in e] for t in (offline, online)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)
    assert len(set(weights[0])) == 3 or layout  # packed, every update sees all rows
    assert online.record()["signals"] == [{"signal": "probe", "scorer": probe.identity(), "rows": 8}]


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_batch_risk_comes_from_the_pass_that_wrote_the_states(tmp_path, tokenizer, probe, head):
    scored = score_dataset(Dataset.from_list(unscored()), probe.score_many)
    spec = {"name": "adaptive", "scope": "batch", "ema": 0.5}
    options = {"policy": spec, "reference": "cached", "settings": SGD, "loss_head": head}
    offline = make(tmp_path / "a", tokenizer, data=list(scored), **options)
    online = make(tmp_path / "b", tokenizer, data=unscored(), probe=probe, **options)
    offline.train()
    online.train()
    assert losses(online) == pytest.approx(losses(offline), rel=2e-5)


@pytest.mark.parametrize(("reference", "forwards"), [("copy", 6), ("cached", 3)])
def test_no_forward_is_added(tmp_path, tokenizer, probe, reference, forwards):
    """Three steps: the policy's own pass, and with a live reference one of its own, probe or not."""
    written = []
    for with_probe in (False, True):
        options = {"probe": probe, "data": unscored()} if with_probe else {}
        trainer = make(tmp_path / str(with_probe), tokenizer, policy="adaptive", reference=reference, **options)
        trainer.args.max_steps = 3
        fills = []
        trainer.model.model.register_forward_hook(lambda *_, fills=fills: fills.append(1))
        trainer._open_store()
        trainer._start()
        started, calls = len(fills), []
        models = [trainer.model] + ([trainer.reference.model] if reference == "copy" else [])
        for model in models:
            model.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        assert len(calls) == forwards
        written.append(started)
    assert written[0] == written[1]


def test_what_cannot_work_is_refused(tmp_path, tokenizer, probe):
    with pytest.raises(ValueError, match="policy 'sft' does not need"):
        make(tmp_path, tokenizer, policy="sft", probe=probe)
    with pytest.raises(ValueError, match="must be known before its forward"):
        make(tmp_path, tokenizer, policy={"name": "adaptive", "scope": "batch"}, probe=probe, reference="copy")
    probe.save_pretrained(tmp_path / "probe")
    alone = Probe.from_pretrained(tmp_path / "probe", weights_only=True)
    assert alone.fingerprint() == probe.fingerprint()
    with pytest.raises(ValueError, match="loaded without its model"):
        alone.p_safe(["fox"])
    other = tiny_model()
    other.resize_token_embeddings(512)
    wide = Probe(
        weight_F=probe.weight_F[:-1],
        bias=0.0,
        layers=probe.layers,
        pooling=probe.pooling,
        model=None,
        tokenizer=None,
        model_name="",
    )
    with pytest.raises(ValueError, match="95 weights, this model gives 96 features"):
        make(tmp_path, tokenizer, policy="adaptive", probe=wide)
