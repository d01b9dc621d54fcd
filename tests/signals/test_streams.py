"""Stream guards: heads on every token, against the architecture written out here."""

from itertools import pairwise

import pytest
import torch
from conftest import THINKING, TRIMMING, added_tokens, byte_bpe, conversation
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from safeshape.signals.guards import load_guard
from safeshape.signals.streams import TokenRiskModel, smoothed, tokens_at

ANSWER = "one two three four five the quick brown fox jumps over"
MESSAGES = [{"role": "system", "content": "obey"}, *conversation("what is this", ANSWER)]
LEVELS = {"0": "Safe", "1": "Unsafe", "2": "Controversial"}


def stream_model(**changes):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        **{"guard_inner_size": 16, "num_risk_level": 3, "response_risk_level_map": LEVELS, **changes},
    )
    model = TokenRiskModel(config).eval()
    torch.nn.init.normal_(model.risk_level_category_layernorm.weight, mean=1.0, std=0.3)
    return model


def stream_tokenizer(template=THINKING, make=byte_bpe):
    tokenizer = make()
    tokenizer.chat_template = template
    return tokenizer


def guard_of(template=THINKING, make=byte_bpe, **row):
    return load_guard(
        {"base": "qwen3guard-stream", **row}, model=stream_model(), tokenizer=stream_tokenizer(template, make)
    )


def token_levels(model, ids):
    """Risk probabilities of every token: body, projection, RMS norm, head, softmax."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
        inner = hidden @ model.risk_level_category_pre.weight.T
        inner = inner / (inner.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * model.risk_level_category_layernorm.weight
        return (inner @ model.risk_level_head.weight.T).softmax(-1)


TEXT = f"<|im_start|>user\nwhat is this<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{ANSWER}"


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_span_has_the_score_of_its_last_token(weight):
    guard = guard_of(controversial_weight=weight)
    ids = guard.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    levels = token_levels(guard.model, ids)
    p_safe = (levels[:, 0] + weight * levels[:, 2]).tolist()
    spans = guard.score(MESSAGES, chunk=2)
    expected = []
    for span in spans:
        head = guard.tokenizer(TEXT[: len(TEXT) - len(ANSWER) + span.end], add_special_tokens=False)["input_ids"]
        assert ids[: len(head)] == head
        expected.append(p_safe[len(head) - 1])
    assert [span.p_safe for span in spans] == pytest.approx(expected, abs=1e-4)
    assert [span.end for span in spans][-1] == len(ANSWER)
    assert max(expected) - min(expected) > 1e-3


def test_a_token_across_a_cut_is_the_one_read():
    guard = guard_of(make=added_tokens)  # "fox jumps" is one token
    text, end = TEXT, len(TEXT) - len(ANSWER) + ANSWER.index("fox") + 3
    encoded = guard.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    across = next(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end < b)
    levels = token_levels(guard.model, encoded["input_ids"])[across]
    span = next(span for span in guard.score(MESSAGES, chunk=1) if ANSWER[: span.end].endswith("fox"))
    assert span.p_safe == pytest.approx((levels[0] + 0.5 * levels[2]).item(), abs=1e-4)


def test_the_whole_answer_is_one_forward():
    guard, seen = guard_of(), []
    guard.model.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    assert len(guard.score(MESSAGES, chunk=1)) == 11
    assert seen == [1]


def test_batches_and_windows_change_nothing():
    guard = guard_of()
    rows = [conversation("what", " ".join(ANSWER.split()[:n])) for n in (1, 3, 11, 7, 5)]
    together = [s.p_safe for score in guard.score_many(rows, chunk=2) for s in score.spans]
    apart = [s.p_safe for score in guard.score_many(rows, chunk=2, batch_size=1, window=1) for s in score.spans]
    assert together == pytest.approx(apart, abs=1e-5)


@pytest.mark.parametrize("answer", ["  one two", "one two \n", " one two ", "one", "é one\ntwo"])
@pytest.mark.parametrize("template", [THINKING, TRIMMING])
def test_spaces_that_a_template_strips_move_nothing(answer, template):
    guard = guard_of(template)
    spans = guard.score(conversation("what", answer), chunk=1)
    plain = guard.score(conversation("what", answer.strip()), chunk=1)
    assert len(spans) == len(plain)
    assert spans[-1].end == len(answer)
    if template == TRIMMING:
        assert [s.p_safe for s in spans] == [s.p_safe for s in plain]


def test_smoothing_by_hand():
    p = torch.tensor([0.9, 0.2, 0.8, 0.3, 0.1, 0.7])
    assert smoothed(p, debounce=1, monotone=False).tolist() == p.tolist()
    assert smoothed(p, debounce=2, monotone=False).tolist() == pytest.approx([0.9, 0.9, 0.8, 0.8, 0.3, 0.7])
    assert smoothed(p, debounce=1, monotone=True).tolist() == pytest.approx([0.9, 0.2, 0.2, 0.2, 0.1, 0.1])
    assert smoothed(p, debounce=2, monotone=True).tolist() == pytest.approx([0.9, 0.9, 0.8, 0.8, 0.3, 0.3])
    assert smoothed(p, debounce=9, monotone=False).tolist() == pytest.approx([0.9] * 6)


@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_debounced_and_monotone_is_the_released_rule_of_two_in_a_row(unsafe):
    hard = torch.tensor([0.0 if flag else 1.0 for flag in unsafe])
    found = smoothed(hard, debounce=2, monotone=True)
    rule = any(a and b for a, b in pairwise(unsafe))
    # One unsafe token at the very start has no token before it to agree with, and counts.
    assert (found[-1].item() == 0.0) == (rule or unsafe[0])


def test_the_knobs_reach_the_scores():
    rows = [conversation("what", ANSWER)]
    plain, debounced, falling = (
        [s.p_safe for s in next(guard_of(**row).score_many(rows, chunk=1)).spans]
        for row in ({}, {"debounce": 3}, {"monotone": True})
    )
    assert all(late >= early for late, early in zip(debounced, plain, strict=True))
    assert debounced != plain
    assert falling == sorted(falling, reverse=True) != plain


def test_tokens_at_by_hand():
    offsets = [(0, 2), (2, 2), (2, 5), (5, 5), (5, 9), (9, 10)]
    assert tokens_at(offsets, 2, [3, 5, 6, 9, 10]) == (2, [2, 2, 4, 4, 5])


def test_a_folder_loads_by_parameter_names_without_remote_code(tmp_path):
    model = stream_model()
    extra = {"lm_head.weight": torch.zeros(512, 32), "query_risk_level_head.weight": torch.zeros(3, 16)}
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), **extra})
    stream_tokenizer().save_pretrained(tmp_path)
    guard = load_guard("qwen3guard-stream", model=str(tmp_path))
    again = guard_of()
    assert [s.p_safe for s in guard.score(MESSAGES)] == pytest.approx([s.p_safe for s in again.score(MESSAGES)])
    score = next(guard.score_many([MESSAGES], chunk=4))
    assert score.scorer["guard"] == "qwen3guard-stream"
    assert score.scorer["model"] == str(tmp_path)


def test_bad_stream_guards_are_refused_in_one_sentence(tmp_path):
    tokenizer = stream_tokenizer()
    plain = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is not a stream guard, its config has no guard_inner_size"):
        load_guard("qwen3guard-stream", model=str(tmp_path / "plain"))
    model = stream_model()
    kept = {name: value for name, value in model.state_dict().items() if name != "risk_level_head.weight"}
    model.save_pretrained(tmp_path / "headless", state_dict=kept)
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="the weights lack risk_level_head"):
        load_guard("qwen3guard-stream", model=str(tmp_path / "headless"))
    with pytest.raises(ValueError, match="kind stream needs a TokenRiskModel, got Qwen3ForCausalLM"):
        load_guard("qwen3guard-stream", model=plain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a loaded guard model needs its tokenizer"):
        load_guard("qwen3guard-stream", model=model)
    with pytest.raises(ValueError, match="the model has no risk level 'Bad'; it has: Safe, Unsafe, Controversial"):
        load_guard({"base": "qwen3guard-stream", "unsafe": "Bad"}, model=model, tokenizer=tokenizer)
    rewriting = stream_tokenizer("{% for m in messages %}{{ m['content'] | upper + '!' }}{% endfor %}")
    guard = load_guard({"base": "qwen3guard-stream", "open_turn": False}, model=model, tokenizer=rewriting)
    with pytest.raises(ValueError, match="chat template rewrites the answer"):
        guard.score(MESSAGES)


def test_an_answer_that_is_too_long_has_no_score_and_the_others_have():
    guard = guard_of()
    rows = [conversation("a", "one two"), conversation("a", "one " * 300), conversation("a", "two")]
    scores = list(guard.score_many(rows))
    assert [score.p_safe is None for score in scores] == [False, True, False]
    assert "tokens, but the guard reads 256" in scores[1].error
