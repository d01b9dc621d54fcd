"""The activation probe: features by position, a fold of the standardisation, and a round trip."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from safeshape.signals.probes import Probe, features


def asks(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


HARMLESS = asks(*(f"fox {a} {b}" for a in ("one", "two", "three") for b in ("dog", "cat", "six")))
HARMFUL = asks(*(f"unsafe {a} {b}" for a in ("one", "two", "three") for b in ("dog", "cat", "six")))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_features_equal_a_plain_forward_whatever_the_batch(kind, pooling, tokenizer):
    model = tiny_model(kind)
    prompts = asks("one", "one two three four five six seven eight")
    got = features(prompts, model=model, tokenizer=tokenizer, layers=(0, -1), pooling=pooling)
    assert got.shape == (2, 64)
    for prompt, row in zip(prompts, got, strict=True):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        picked = [s[0, -1] if pooling == "last" else s[0].mean(0) for s in (states[0], states[-1])]
        assert np.allclose(row, torch.cat(picked).numpy(), atol=1e-5)


def test_fit_separates_and_survives_saving(tmp_path, tokenizer):
    model = tiny_model()
    probe = Probe.fit(
        HARMLESS + HARMFUL, [False] * 9 + [True] * 9, model=model, tokenizer=tokenizer, layers=(1,), pooling="mean"
    )
    p_safe = probe.p_safe(HARMLESS + HARMFUL)
    assert min(p_safe[:9]) > 0.5 > max(p_safe[9:])
    probe.save_pretrained(tmp_path)
    again = Probe.from_pretrained(tmp_path, model=model, tokenizer=tokenizer)
    assert again.p_safe(HARMFUL) == pytest.approx(p_safe[9:], abs=1e-6)


def test_the_probe_equals_scikit_learns_pipeline(tokenizer):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, labels = tiny_model(), [False] * 9 + [True] * 9
    x = features(HARMLESS + HARMFUL, model=model, tokenizer=tokenizer, layers=(2,))
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, labels).predict_proba(x)
    probe = Probe.fit(HARMLESS + HARMFUL, labels, model=model, tokenizer=tokenizer, layers=(2,), C=0.1, calibrate=False)
    assert probe.p_safe(HARMLESS + HARMFUL) == pytest.approx(expected[:, 0].tolist(), abs=1e-4)


def test_only_the_prompt_is_read(tokenizer):
    model = tiny_model()
    probe = Probe.fit(HARMLESS + HARMFUL, [False] * 9 + [True] * 9, model=model, tokenizer=tokenizer)
    rows = [[*HARMFUL[0], {"role": "assistant", "content": text}] for text in ("one", "two three")]
    first, second = probe.score_many(rows)
    assert first.p_safe == second.p_safe
    assert first.spans == ()


def test_bad_input_is_refused(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="there is no layer 3"):
        features(HARMFUL, model=model, tokenizer=tokenizer, layers=(3,))
    with pytest.raises(ValueError, match="2 prompts but 1 labels"):
        Probe.fit(HARMFUL[:2], [True], model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="needs harmful and harmless"):
        Probe.fit(HARMFUL[:2], [True, True], model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        Probe.fit(HARMFUL[:1] + HARMLESS[:1], [True, False], model=model)


def test_paths_and_plain_strings_do_as_well(tmp_path, model_folder, tokenizer):
    texts = [prompt[0]["content"] for prompt in HARMLESS + HARMFUL]
    probe = Probe.fit(texts, [False] * 9 + [True] * 9, model=str(model_folder))
    probe.save_pretrained(tmp_path)
    again = Probe.from_pretrained(tmp_path)
    assert again.p_safe(HARMFUL) == pytest.approx(probe.p_safe(texts[9:]), abs=1e-6)
    with pytest.raises(ValueError, match="the probe has 32 weights, this model gives 16 features"):
        from transformers import LlamaConfig, LlamaForCausalLM

        small = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
        )
        Probe.from_pretrained(tmp_path, model=small, tokenizer=tokenizer)
