"""Reading prompts: padding, batches, memory, the store, encoders and decoders."""

import gc
import importlib

import numpy as np
import pytest
import torch
from conftest import byte_bpe, tiny_model
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from safeshape.signals.probes import Probe, extract, features, open_reader
from safeshape.signals.probes.reading import pooled_batch, rendered, states_of, token_ids, verify, weights_sha256
from safeshape.store import Store

PROMPTS = ["one", "one two three four five six", "the quick brown fox", "a conversation has a user and an assistant"]


def bert(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=512, max_position_embeddings=64, initializer_range=0.2, **{**sizes, **changes})
    return BertModel(config).eval()


def plain_tokenizer():
    tokenizer = byte_bpe()
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gpt2", "bert"])
def test_padding_and_batching_change_nothing(kind, pooling):
    if kind == "bert":
        model, tokenizer = bert(), plain_tokenizer()
    elif kind == "gpt2":  # absolute positions: padded on the left they must be counted from the first real token
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", vocab_size=512, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)
        model, tokenizer = AutoModel.from_config(config).eval(), byte_bpe()
    else:
        model, tokenizer = tiny_model(kind), byte_bpe()
    options = {"model": model, "tokenizer": tokenizer, "layers": (0, 1, -1), "pooling": pooling}
    alone = features(PROMPTS, **options, batch_size=1)
    for side in ("left", "right"):
        assert np.allclose(features(PROMPTS, **options, batch_size=4, padding_side=side), alone, atol=1e-5)
    assert np.allclose(features(PROMPTS[::-1], **options, batch_size=2), alone[::-1], atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def test_closed_form_of_pooling():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[100.0, 100.0], [5.0, 7.0], [1.0, 1.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pooled_batch(states, mask, "last").tolist() == [[3.0, 6.0], [1.0, 1.0]]
    assert pooled_batch(states, mask, "mean").tolist() == [[2.0, 4.0], [3.0, 4.0]]
    # Half precision is pooled in single: 256 times 1.0 and one 257.0 would lose their digits otherwise.
    half = torch.cat([torch.ones(1, 256, 1), torch.full((1, 1, 1), 257.0)], 1).bfloat16()
    assert pooled_batch(half, torch.ones(1, 257), "mean").item() == pytest.approx((256 + half[0, -1, 0].item()) / 257)


def test_the_mean_over_layers_is_the_mean_of_the_layers(tokenizer):
    options = {"model": tiny_model(), "tokenizer": tokenizer, "layers": (0, 2)}
    both = features(PROMPTS, **options).reshape(4, 2, 32)
    assert np.allclose(features(PROMPTS, **options, layer_pooling="mean"), both.mean(1), atol=1e-6)


def test_the_states_of_a_batch_are_not_held(tokenizer):
    """Reading every layer of eight keeps no more tensors of the batch's size than reading one."""
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4
    )
    model = AutoModel.from_config(config).eval()
    reader = open_reader(model, tokenizer)
    ids = token_ids(PROMPTS[1:3], reader)
    shape = (2, max(map(len, ids)), 32)

    def alive_at_the_last_layer(layers):
        seen = []
        handle = model.layers[-1].register_forward_hook(
            lambda *_: seen.append(sum(torch.is_tensor(o) and o.shape == shape for o in gc.get_objects()))
        )
        states_of(ids, reader, layers=layers, poolings=("last", "mean"), side="right")
        handle.remove()
        return seen[0]

    assert alive_at_the_last_layer(range(9)) <= alive_at_the_last_layer((8,)) + 1


def test_only_the_chosen_features_are_kept(tokenizer, monkeypatch):
    """40 prompts in windows of 8: the one array that grows is the result, and every window is read apart."""
    module = importlib.import_module("safeshape.signals.probes.features")
    monkeypatch.setattr(module, "WINDOW", 8)
    model, sizes = tiny_model(), []
    real = module.token_ids
    monkeypatch.setattr(module, "token_ids", lambda some, reader: sizes.append(len(some)) or real(some, reader))
    options = {"model": model, "tokenizer": tokenizer, "layers": (1, 2)}
    found = features(PROMPTS * 10, **options)
    assert sizes == [8] * 5
    assert found.nbytes == 40 * 2 * 32 * 4
    assert found.base is None or found.base.nbytes == found.nbytes
    assert np.allclose(found[36:], found[:4], atol=1e-5)


def test_a_second_pass_reads_the_store_and_not_the_model(tmp_path, tokenizer):
    model, calls = tiny_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    reader = open_reader(model, tokenizer)
    options = {"layers": (1, -1), "poolings": ("last", "mean")}
    with Store(tmp_path / "s") as store:
        first = extract(PROMPTS, reader, **options, store=store)
        assert len(calls) == 1
        assert np.array_equal(extract(PROMPTS, reader, **options, store=store), first)
        assert len(calls) == 1
        assert np.array_equal(extract([*PROMPTS, "ten"], reader, **options, store=store)[:4], first)
        assert len(calls) == 2  # one new prompt
        extract(PROMPTS, reader, layers=(1, 0), poolings=("last", "mean"), store=store)
        assert len(calls) == 3  # other layers
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        moved = extract(PROMPTS, reader, **options, store=store)
        assert len(calls) == 4  # other weights
        assert not np.array_equal(moved, first)


def test_an_encoder_reads_plain_text_with_its_special_tokens():
    tokenizer = plain_tokenizer()
    reader = open_reader(bert(), tokenizer)
    assert not reader.chat
    assert reader.depth == 4
    assert (
        rendered([{"role": "system", "content": "one"}, {"role": "user", "content": "two"}], tokenizer) == "one\n\ntwo"
    )
    verify(reader)
    words = ["fox one", "fox two", "fox six", "unsafe one", "unsafe two", "unsafe six"]
    probe = Probe.fit(words, [False] * 3 + [True] * 3, model=bert(), tokenizer=tokenizer, pooling="mean", layers="all")
    assert probe.layers == (0, 1, 2, 3)
    assert probe.card["read_as"] == "plain text with special tokens"
    p_safe = probe.p_safe(words)
    assert min(p_safe[:3]) > max(p_safe[3:])


def test_taps_that_do_not_see_the_models_own_states_are_refused(tokenizer):
    model = tiny_model()
    reader = open_reader(model, tokenizer)
    verify(reader)
    crossed = type(reader)(
        model=reader.model, tokenizer=tokenizer, blocks=(reader.blocks[1], reader.blocks[0]), hidden=reader.hidden
    )
    with pytest.raises(ValueError, match="does not read hidden state 0"):
        verify(crossed)


def test_what_cannot_be_read_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, the model reads 64"):
        token_ids(["one", "one two three " * 40], open_reader(bert(), plain_tokenizer()))
    t5 = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="not an encoder-decoder"):
        open_reader(AutoModel.from_config(t5), tokenizer)


def test_the_hash_of_a_model_is_of_its_weights_and_shape():
    assert weights_sha256(tiny_model()) == weights_sha256(tiny_model())
    assert weights_sha256(tiny_model()) != weights_sha256(tiny_model(seed=1))
    assert weights_sha256(tiny_model()) != weights_sha256(tiny_model().bfloat16())
