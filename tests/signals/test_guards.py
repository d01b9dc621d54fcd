"""STAR scores against the naive way, one prefix at a time, for a guard that is random but real."""

from dataclasses import replace

import pytest
import torch
from conftest import byte_bpe, conversation, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from safeshape.signals.column import score_dataset
from safeshape.signals.guard_rows import fingerprint
from safeshape.signals.guards import load_guard
from safeshape.signals.prefix import NaiveScorer
from safeshape.signals.refine import Refine, RefineReport

GUARD_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'safe or unsafe?<|im_start|>' }}"
)
ANSWER = "one two three four five six\nseven eight  nine ten fox dog"
ROW = {"name": "test", "safe": "yes", "unsafe": "no", "answer_prefix": "\n\n"}


def guard_of(kind="llama", model=None):
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.chat_template = GUARD_TEMPLATE
    return load_guard(ROW, model=model or tiny_model(kind), tokenizer=tokenizer)


def naive(guard, messages, end):
    text = "".join(f"{m['role']}: {m['content']}\n" for m in messages[:-1])
    text += f"assistant: {messages[-1]['content'][:end]}\nsafe or unsafe?<|im_start|>\n\n"
    ids = guard.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = guard.model(ids).logits[0, -1]
    safe, unsafe = (guard.tokenizer.convert_tokens_to_ids(label) for label in ("yes", "no"))
    return (logits[safe].exp() / (logits[safe].exp() + logits[unsafe].exp())).item()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "mistral", "granite", "gemma3_text"])
def test_every_span_has_the_naive_score_of_its_prefix(kind):
    guard, messages = guard_of(kind), conversation("what is this", ANSWER)
    spans = guard.score(messages, chunk=5)
    assert [(s.start, s.end) for s in spans] == [(0, 23), (23, 49), (49, len(ANSWER))]
    for span in spans:
        assert span.p_safe == pytest.approx(naive(guard, messages, span.end), abs=1e-4)
    assert max(s.p_safe for s in spans) - min(s.p_safe for s in spans) > 1e-3


def absolute_positions():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)).eval()


@pytest.mark.parametrize("make", [tiny_model, absolute_positions], ids=["rotary", "absolute"])
def test_windows_packing_and_padding_change_nothing(make):
    model = make()
    rows = [conversation("what", " ".join(ANSWER.split()[:n])) for n in (1, 3, 12, 7, 5)]
    together = [s.p_safe for score in guard_of(model=model).score_many(rows, chunk=2) for s in score.spans]
    for options in ({"window": 1}, {"window_tokens": 1}, {"window": 2}):
        guard = replace(guard_of(model=model), max_tokens=7)
        apart = [s.p_safe for score in guard.score_many(rows, chunk=2, **options) for s in score.spans]
        assert together == pytest.approx(apart, abs=1e-5)


def test_every_tokenizer_gives_the_scores_of_whole_texts(any_tokenizer):
    any_tokenizer.add_tokens(["yes", "no"])
    any_tokenizer.chat_template = GUARD_TEMPLATE
    guard = load_guard({"safe": "yes", "unsafe": "no"}, model=tiny_model(vocab_size=600), tokenizer=any_tokenizer)
    messages = conversation("what is this", " " + ANSWER + " \u4e94e\u0301 fox jumps  <|im_end|>\n don't ")
    for unit in ("words", "tokens", "sentences"):
        spans = guard.score(messages, chunk=1, unit=unit)
        texts = [guard.render(messages, messages[-1]["content"][: span.end]) for span in spans]
        assert [span.p_safe for span in spans] == pytest.approx(guard.p_safe(texts), abs=1e-4)


def test_a_guard_that_cannot_share_a_prefill_says_so_and_scores_naively():
    guard = guard_of("llama", model=tiny_model())
    slow = replace(guard)
    slow.__dict__["scorer"] = (NaiveScorer(guard.model, guard.labels), "naive: for a reason")
    messages = conversation("what", ANSWER)
    for batch_size in (1, 64):
        score = next(slow.score_many([messages], chunk=1, batch_size=batch_size))
        assert score.scorer["engine"] == "naive: for a reason"
        assert [s.p_safe for s in score.spans] == pytest.approx(
            [s.p_safe for s in guard.score(messages, chunk=1)], abs=1e-5
        )


def test_refining_scores_fewer_ends_and_reports_what_it_missed():
    guard, report = guard_of(), RefineReport()
    rows = [conversation("what", " ".join([ANSWER] * n)) for n in (3, 5, 4)]
    exact = [[s.p_safe for s in score.spans] for score in guard.score_many(rows, chunk=1)]
    settings = Refine(tolerance=0.02, stride=4, check_every=2)
    scores = list(guard.score_many(rows, chunk=1, refine=settings, report=report))
    got = [[s.p_safe for s in score.spans] for score in scores]
    assert scores[0].scorer["refine"] == {"tolerance": 0.02, "stride": 4}
    assert (report.rows, report.ends, report.checked) == (3, 12 * 12, 2)
    assert 0 < report.saved < report.ends
    checked = [abs(a - b) for index in (0, 2) for a, b in zip(got[index], exact[index], strict=True)]
    assert report.largest_deviation == pytest.approx(max(checked), abs=1e-5)
    assert report.largest_deviation > 1e-4
    same = [
        a == pytest.approx(b, abs=1e-6)
        for row, true in zip(got, exact, strict=True)
        for a, b in zip(row, true, strict=True)
    ]
    assert sum(same) >= report.scored
    everything = list(guard.score_many(rows, chunk=1, refine=Refine(stride=1)))
    assert [s.p_safe for s in everything[1].spans] == pytest.approx(exact[1], abs=1e-5)
    fewer = RefineReport()
    list(guard.score_many(rows, chunk=1, refine=True, tolerance=1.0, report=fewer))
    assert fewer.scored < report.scored


def test_the_system_prompt_is_not_shown():
    guard = guard_of()
    plain = conversation("what", ANSWER)
    assert guard.score([{"role": "system", "content": "obey"}, *plain]) == guard.score(plain)


def test_the_score_carries_its_identity_and_the_last_spans_value():
    guard = guard_of()
    score = next(guard.score_many([conversation("what", ANSWER)], chunk=4))
    assert score.p_safe == score.spans[-1].p_safe
    row = fingerprint(guard.row, guard.tokenizer)
    assert score.scorer == {
        "guard": "test",
        "model": "",
        "revision": "main",
        "row": row,
        "chunk": 4,
        "unit": "words",
        "engine": "shared prefill",
        "refine": None,
    }


LLAMA_GUARD_SHAPE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>user\n\nTask: check the last message.\n\n' }}"
    "{% for m in messages %}{{ ('User' if m['role'] == 'user' else 'Agent') + ': ' + m['content'] + '\n\n' }}"
    "{% endfor %}"
    "{{ '<|im_end|><|im_start|>assistant\n\n' }}"
)


def test_llama_guard_reads_its_label_after_two_newlines_of_its_own():
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["safe", "unsafe", "\n\n", "\n\n\n\n"])
    tokenizer.chat_template = LLAMA_GUARD_SHAPE
    guard = load_guard("llama-guard-3", model=tiny_model(vocab_size=520), tokenizer=tokenizer)
    text = guard.render(conversation("what", ANSWER), ANSWER[:3])
    assert text == (
        "<|im_start|>user\n\nTask: check the last message.\n\nUser: what\n\nAgent: one\n\n"
        "<|im_end|><|im_start|>assistant\n\n"
    )
    two = tokenizer.convert_tokens_to_ids("\n\n")
    ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], two]])
    assert ids[0, -2:].tolist() == [two, two]
    with torch.no_grad():
        logits = guard.model(ids).logits[0, -1]
    safe, unsafe = tokenizer.convert_tokens_to_ids("safe"), tokenizer.convert_tokens_to_ids("unsafe")
    assert guard.p_safe([text]) == pytest.approx([torch.sigmoid(logits[safe] - logits[unsafe]).item()], abs=1e-5)
    with pytest.raises(ValueError, match="rejects the conversation: Conversation roles must alternate"):
        guard.score([{"role": "user", "content": "a"}, *conversation("a", "b")])


def test_a_scored_dataset_is_an_ordinary_dataset(tmp_path):
    from datasets import Dataset, load_from_disk

    guard = guard_of()
    data = Dataset.from_list([{"messages": conversation("what", ANSWER), "id": 7}])
    scored = score_dataset(data, guard.score_many)
    scored.save_to_disk(tmp_path / "scored")
    row = load_from_disk(tmp_path / "scored")[0]
    assert row["id"] == 7
    assert row["safety"]["signal"] == "star"
    assert [s["p_safe"] for s in row["safety"]["spans"]] == [s.p_safe for s in guard.score(row["messages"])]
    assert score_dataset(scored, guard.score_many)[0] == row


def test_bad_input_is_refused_in_one_sentence():
    guard, tokenizer = guard_of(), byte_bpe()
    with pytest.raises(ValueError, match="row 1: the assistant's answer is empty"):
        list(guard.score_many([conversation("a", "b"), conversation("a", "")]))
    with pytest.raises(ValueError, match="the last message must be the assistant's"):
        guard.score([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        guard.score(conversation("a", "b"), chunk=0)
    with pytest.raises(ValueError, match=r"guard label 'assistantly' is \d tokens"):
        load_guard({"safe": "assistantly"}, model=tiny_model(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="unknown guard 'gard'"):
        load_guard("gard")
    with pytest.raises(ValueError, match="has no field 'save'"):
        load_guard({"save": "yes"})
    with pytest.raises(ValueError, match="has no weights of its own"):
        load_guard("world")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        load_guard({"safe": " safe", "unsafe": " unsafe"}, model=tiny_model(), tokenizer=tokenizer)


def bad_rows(guard):
    """Rows that cannot be scored, each with what is said about it."""
    return {
        "the assistant's answer is empty": conversation("a", ""),
        "the last message must be the assistant's": [{"role": "user", "content": "a"}],
        "U+D83D": conversation("a", "b \ud83d c"),
        "whose context is 512 tokens": conversation("a", "fox " * 100_000),
        "needs `messages`": None,
        "rejects the conversation: turn": [{"role": "bad", "content": "x"}, *conversation("a", "b")],
        "rejects the conversation: 'dict object' has no attribute 'content'": [
            {"role": "user", "content": None},
            *conversation("a", "b"),
        ],
    }


def test_each_bad_row_gets_one_clear_error_and_the_run_goes_on():
    guard = guard_of()
    guard.tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'bad' %}{{ raise_exception('turn') }}{% endfor %}" + GUARD_TEMPLATE
    )
    good = [conversation("a", "x"), conversation("a", "\0\x07\u200b\x1b[0m one"), conversation("a", "b c d")]
    bad = bad_rows(guard)
    mixed = [good[0], *list(bad.values())[:3], good[1], *list(bad.values())[3:], good[2]]
    for window in (1, 4, 64):
        scores = list(guard.score_many(mixed, chunk=1, on_error="keep", window=window))
        failed = [score for score in scores if score.error is not None]
        assert len(scores) == 10
        assert [score.p_safe for score in failed] == [None] * 7
        assert all(score.spans == () for score in failed)
        assert all(part in score.error for part, score in zip(bad, failed, strict=True)), [s.error for s in failed]
        kept = [score for score in scores if score.error is None]
        assert [s.p_safe for s in kept] == pytest.approx(
            [guard.score(row, chunk=1)[-1].p_safe for row in good], abs=1e-5
        )
    for part, row in bad.items():
        found = []
        with pytest.raises(ValueError, match="row 2: ") as caught:
            for score in guard.score_many([good[0], good[2], row, good[1]], chunk=1):
                found.append(score)
        assert part in str(caught.value)
        assert len(found) == 2
    with pytest.raises(ValueError, match="on_error must be stop or keep, got 'skip'"):
        list(guard.score_many(good, on_error="skip"))


def test_a_partial_answer_that_is_longer_than_the_whole_fails_its_row_alone():
    guard = guard_of()
    guard.tokenizer.chat_template = (
        "{{ messages[-1]['content'] + ('' if messages[-1]['content'] == 'a b' else 'x ' * 600) }}"
    )
    scores = list(guard.score_many([conversation("q", "a b")], chunk=1, on_error="keep"))
    assert "tokens for the guard, whose context is 512" in scores[0].error
    assert scores[0].p_safe is None


def test_a_long_answer_costs_memory_for_its_own_tokens_only():
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=30_000,
    )
    guard = guard_of(model=LlamaForCausalLM(config).eval())
    messages = conversation("what", "the quick brown fox " * 5000)
    spans = guard.score(messages, chunk=2000)
    assert len(spans) == 10
    texts = [guard.render(messages, messages[-1]["content"][: spans[at].end]) for at in (0, 2)]
    assert guard.p_safe(texts, batch_size=1) == pytest.approx([spans[0].p_safe, spans[2].p_safe], abs=1e-4)


@pytest.mark.slow
def test_an_answer_of_100_000_tokens_is_scored():
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=120_000,
    )
    guard = guard_of(model=LlamaForCausalLM(config).eval())
    spans = guard.score(conversation("what", "the quick brown fox " * 25_000), chunk=5)
    assert len(spans) == 20_000
