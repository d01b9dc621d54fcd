"""Branches of a shared prefill against one forward per sequence, for every shape of attention that guards have."""

import random

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from safeshape.signals.partials import Branch
from safeshape.signals.prefix import (
    NaiveScorer,
    PrefixScorer,
    choose_scorer,
    label_head,
    long_limit,
    naive_label_logits,
)

LABELS = (5, 9, 11)
HEADED = {"head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 100,
    "factor": 5.12,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES = {
    "llama": ("llama", {}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "dynamic rope": ("llama", {"rope_parameters": DYNAMIC}),
    "qwen3": ("qwen3", HEADED),
    "yarn": ("qwen3", {**HEADED, "rope_parameters": YARN}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 16}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 100}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "gemma2": ("gemma2", {**HEADED, "sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**HEADED, "sliding_window": 16, "num_hidden_layers": 7}),
    "gpt-oss": ("gpt_oss", {**HEADED, **EXPERTS, "sliding_window": 16, "rope_parameters": YARN}),
    "llama4": (
        "llama4_text",
        {
            **HEADED,
            "num_hidden_layers": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 32,
        },
    ),
    "cohere2": ("cohere2", {"sliding_window": 16, "logit_scale": 2.0}),
    "gpt2": ("gpt2", {}),
}


def shaped(name, **changes):
    kind, options = SHAPES.get(name, (name, {}))
    options = {**options, **changes}
    if kind == "llama" and not options:
        return tiny_model()
    torch.manual_seed(0)
    base = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    options = {**base, **options}
    attention = options.pop("attn_implementation", None)
    if kind == "gpt2":
        del options["num_key_value_heads"], options["intermediate_size"]
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **options), **({"attn_implementation": attention} if attention else {})
    ).eval()


def tree(seed, lengths=(25, 90, 140)):
    """Trunks with a common header, and branches that leave them everywhere: early, late, twice at the same token."""
    rng = random.Random(seed)

    def some(count):
        return [rng.randrange(3, 500) for _ in range(count)]

    header, rows = some(20), []
    for length in lengths:
        trunk, suffix = header + some(length - 20), some(24)
        branches = [Branch(kept=end, ids=tuple(suffix)) for end in range(3, length, 11)]
        branches += [Branch(kept=0, ids=tuple(trunk[:21] + suffix)), Branch(kept=21, ids=tuple(suffix[:3]))]
        branches += [Branch(kept=0, ids=tuple(trunk)), Branch(kept=length, ids=()), Branch(kept=0, ids=tuple(suffix))]
        rows.append((trunk, branches))
    return rows


def whole(trunk, branches):
    return [[*trunk[: branch.kept], *branch.ids] for branch in branches]


@pytest.mark.parametrize("name", SHAPES)
def test_branches_equal_one_forward_per_sequence(name):
    model, rows = shaped(name), tree(0)
    want = torch.cat([naive_label_logits(model, whole(*row), LABELS, batch_size=1) for row in rows])
    assert want.std() > 0.05
    for max_tokens in (4096, 37):
        scorer = PrefixScorer(model, LABELS, max_tokens=max_tokens)
        together = scorer.label_logits_many(
            list(zip(scorer.open_many([trunk for trunk, _ in rows]), [branches for _, branches in rows], strict=True))
        )
        assert torch.cat(together) == pytest.approx(want, abs=1e-4)
        apart = [scorer.label_logits(scorer.open(trunk), branches) for trunk, branches in rows]
        assert torch.cat(apart) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("phi3, longrope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama4", {"attention_chunk_size": 512}),
    ],
)
def test_windows_and_scaling_are_within_the_tests_reach(name, changes):
    trunk, branches = tree(0)[2]
    plain = naive_label_logits(shaped(name, **changes), whole(trunk, branches), LABELS)
    assert (plain - naive_label_logits(shaped(name), whole(trunk, branches), LABELS)).abs().max() > 0.01


def test_a_longrope_batch_never_mixes_short_and_long_rows():
    model, rows = shaped("phi3, longrope"), [list(range(3, 3 + length)) for length in (90, 99, 100, 101, 130)]
    assert long_limit(model.config) == 100
    apart = naive_label_logits(model, rows, LABELS, batch_size=1)
    assert naive_label_logits(model, rows, LABELS, batch_size=4) == pytest.approx(apart, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 200))
def test_any_tree_and_any_packing(seed, lengths, max_tokens):
    model, rng = tiny_model(), random.Random(seed)
    rows = []
    for length in lengths:
        trunk = [rng.randrange(3, 6) for _ in range(length)]
        kept = [rng.randrange(length + 1) for _ in range(5)]
        rows.append((trunk, [Branch(kept=k, ids=tuple(rng.choices(range(3, 6), k=rng.randrange(1, 9)))) for k in kept]))
    scorer = PrefixScorer(model, LABELS, max_tokens=max_tokens)
    trunks = scorer.open_many([trunk for trunk, _ in rows])
    got = scorer.label_logits_many([(trunk, row[1]) for trunk, row in zip(trunks, rows, strict=True)])
    for row, logits_SK in zip(rows, got, strict=True):
        assert logits_SK == pytest.approx(naive_label_logits(model, whole(*row), LABELS), abs=1e-4)


def test_every_token_is_run_once():
    rows, scorer = tree(1), PrefixScorer(tiny_model(), LABELS)
    trunks = scorer.open_many([trunk for trunk, _ in rows])
    assert scorer.forwarded == 20 + 5 + 70 + 120
    scorer.label_logits(trunks[1], [Branch(kept=0, ids=(*rows[1][0][:50], 3, 4)), Branch(kept=90, ids=())])
    assert scorer.forwarded == 215 + 2 + 1
    scorer.open(rows[2][0][:30])
    assert scorer.forwarded == 218 + 10
    scorer.open([500, *rows[0][0]])
    assert scorer.forwarded == 228 + 26


def test_no_forward_is_larger_than_asked(monkeypatch):
    from safeshape.signals import prefix

    sizes, plan = [], prefix.Plan
    monkeypatch.setattr(prefix, "Plan", lambda *args: sizes.append(sum(len(s.ids) for s in args[0])) or plan(*args))
    rows, scorer = tree(2), PrefixScorer(tiny_model(), LABELS, max_tokens=50)
    for trunk, branches in rows:
        far_off = Branch(kept=2, ids=tuple(range(100, 180)))
        got = scorer.label_logits(scorer.open(trunk), [*branches, far_off])
        want = naive_label_logits(tiny_model(), whole(trunk, [far_off]), LABELS)
        assert got[-1:] == pytest.approx(want, abs=1e-4)
    assert max(sizes) <= 50
    assert len(sizes) > 10


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    head, attention, ids = model.get_output_embeddings(), model.config._attn_implementation, torch.arange(3, 30)[None]
    before = model(ids).logits
    scorer = PrefixScorer(model, LABELS)
    scorer.open([3, 4, 5])
    with pytest.raises(IndexError):
        scorer.open([3, 4, 100000])
    assert model.get_output_embeddings() is head
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids).logits, before)


def test_a_cut_head_gives_the_whole_heads_logits():
    for name in ("granite", "gemma2", "cohere2"):
        model, ids = shaped(name), torch.arange(3, 30)[None]
        want = model(ids).logits[..., list(LABELS)].detach()
        with label_head(model, LABELS):
            got = model(ids).logits.detach()
        assert got.shape == (1, 27, 3)
        assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_its_rounding_only(dtype):
    model, (trunk, branches) = tiny_model().to(dtype), tree(0)[1]
    scorer, why = choose_scorer(model, LABELS, trunk)
    assert why == "shared prefill"
    exact = naive_label_logits(tiny_model(), whole(trunk, branches), LABELS)
    off = [
        (logits - exact).abs().max()
        for logits in (
            scorer.label_logits(scorer.open(trunk), branches),
            naive_label_logits(model, whole(trunk, branches), LABELS),
        )
    ]
    assert off[0] < 2 * off[1]


def test_a_changed_model_is_seen_after_forgetting():
    model, (trunk, branches) = tiny_model(), tree(0)[1]
    scorer = PrefixScorer(model, LABELS)
    before = scorer.label_logits(scorer.open(trunk), branches)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    scorer.forget()
    after = scorer.label_logits(scorer.open(trunk), branches)
    assert after == pytest.approx(naive_label_logits(model, whole(trunk, branches), LABELS), abs=1e-4)
    assert (before - after).abs().max() > 0.01


def test_what_is_too_long_is_refused():
    scorer = PrefixScorer(tiny_model(), LABELS)
    trunk = scorer.open([3] * 512)
    with pytest.raises(ValueError, match="the text is 513 tokens for the guard, whose context is 512 tokens"):
        scorer.open([3] * 513)
    with pytest.raises(ValueError, match="the text is 513 tokens"):
        scorer.label_logits(trunk, [Branch(kept=512, ids=(4,))])
    with pytest.raises(ValueError, match="the text is 0 tokens"):
        scorer.open([])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        PrefixScorer(tiny_model(), LABELS, max_tokens=0)


def recurrent():
    config = AutoConfig.for_model("mamba", vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config).eval()


def hybrid():
    return shaped("lfm2", layer_types=["conv", "full_attention"])


def looks_ahead():
    return shaped("gemma3", use_bidirectional_attention=True)


def other_head():
    class Doubled(torch.nn.Linear):
        pass

    model = tiny_model()
    model.set_output_embeddings(Doubled(32, 512, bias=False))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (recurrent, "naive: MambaForCausalLM does not take its attention from a function"),
        (hybrid, "naive: layers of type conv cannot share a prefill"),
        (looks_ahead, "naive: a shared prefill changes this model's logits"),
        (other_head, "naive: the head is a Doubled, not a plain linear layer"),
        (tiny_model, "shared prefill"),
    ],
)
def test_a_model_that_cannot_share_is_scored_naively_and_says_so(make, reason):
    torch.manual_seed(0)
    model = make()
    scorer, why = choose_scorer(model, LABELS, list(range(3, 40)))
    assert why == reason
    assert isinstance(scorer, PrefixScorer if reason == "shared prefill" else NaiveScorer)
    trunk, branches = list(range(5, 25)), [Branch(kept=9, ids=(4, 4)), Branch(kept=20, ids=(7,))]
    got = scorer.label_logits_many(list(zip(scorer.open_many([trunk]), [branches], strict=True)))[0]
    with torch.no_grad():
        for ids, logits_K in zip(whole(trunk, branches), got, strict=True):
            want = model(torch.tensor([ids])).logits[0, -1, list(LABELS)]
            assert logits_K == pytest.approx(want, abs=1e-4)
