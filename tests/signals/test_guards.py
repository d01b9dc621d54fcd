"""STAR scores against the naive way, one prefix at a time, for a guard that is random but real."""

import pytest
import torch
from conftest import byte_bpe, conversation, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from safeshape.signals.chunks import chunk_ends
from safeshape.signals.column import score_dataset
from safeshape.signals.guard_rows import fingerprint
from safeshape.signals.guards import load_guard

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
def test_batching_and_windows_change_nothing(make):
    guard = guard_of(model=make())
    rows = [conversation("what", " ".join(ANSWER.split()[:n])) for n in (1, 3, 12, 7, 5)]
    together = [s.p_safe for score in guard.score_many(rows, chunk=2) for s in score.spans]
    apart = [s.p_safe for score in guard.score_many(rows, chunk=2, batch_size=1, window=1) for s in score.spans]
    assert together == pytest.approx(apart, abs=1e-5)


def test_the_system_prompt_is_not_shown():
    guard = guard_of()
    plain = conversation("what", ANSWER)
    assert guard.score([{"role": "system", "content": "obey"}, *plain]) == guard.score(plain)


@pytest.mark.parametrize(
    ("answer", "chunk", "unit", "ends"),
    [
        ("a b c d", 2, "words", [3, 7]),
        ("a b c d e", 2, "words", [3, 7, 9]),
        ("a b c ", 2, "words", [3, 6]),
        ("a b c d ", 2, "words", [3, 8]),
        ("x", 5, "words", [1]),
        (" x", 1, "words", [2]),
        ("one two", 1, "tokens", [3, 7]),
    ],
)
def test_chunks_tile_the_answer(answer, chunk, unit, ends, tokenizer):
    assert chunk_ends(answer, chunk, unit, tokenizer) == ends


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
