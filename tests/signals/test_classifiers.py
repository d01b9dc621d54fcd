"""Sequence classifiers as guards, against the classifier's own forward of each partial text."""

import pytest
import torch
from conftest import added_tokens, byte_bpe, conversation
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification

from safeshape.signals.guards import load_guard

ANSWER = "one two three four five the quick brown fox jumps over"
MESSAGES = [{"role": "system", "content": "obey"}, *conversation("what is this", ANSWER)]
OPEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
CLOSED = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def tiny_classifier(kind, classes=("safe", "unsafe"), *, pad=0, positions=512):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **({} if kind in ("bert", "modernbert", "deberta-v2") else {"num_key_value_heads": 2}),
        max_position_embeddings=positions,
        initializer_range=0.3,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
        **{"modernbert": {"initializer_cutoff_factor": 2.0}, "qwen3": {"head_dim": 8}}.get(kind, {}),
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def bert_like():
    """A tokenizer that writes its own marks around a text, and has no chat template."""
    tokenizer = byte_bpe()
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<|im_start|>", "<|im_end|>")]
    processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = None
    return tokenizer


def causal_tokenizer(template=OPEN, make=byte_bpe):
    tokenizer = make()
    tokenizer.chat_template = template
    return tokenizer


def naive(model, tokenizer, texts, **options):
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", **options)["input_ids"]
        with torch.no_grad():
            found.append(model(ids).logits[0].softmax(-1)[0].item())
    return found


def chatted(partial, end=""):
    return f"<|im_start|>user\nwhat is this<|im_end|>\n<|im_start|>assistant\n{partial}{end}"


def partials(step):
    words = ANSWER.split()
    return [" ".join(words[: n + step]) for n in range(0, len(words), step)]


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2", "llama"])
def test_a_classifier_reads_each_partial_answer_alone(kind):
    model, tokenizer = tiny_classifier(kind), bert_like()
    guard = load_guard("classifier", model=model, tokenizer=tokenizer)
    expected = naive(model, tokenizer, partials(2))
    assert [s.p_safe for s in guard.score(MESSAGES, chunk=2)] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("make", [byte_bpe, added_tokens])
@pytest.mark.parametrize("one_pass", [True, False])
def test_a_causal_classifier_reads_every_prefix_as_its_own_forward_does(kind, make, one_pass):
    model, tokenizer = tiny_classifier(kind), causal_tokenizer(make=make)
    guard = load_guard({"base": "causal-classifier", "one_pass": one_pass}, model=model, tokenizer=tokenizer)
    expected = naive(model, tokenizer, [chatted(p) for p in partials(1)], add_special_tokens=False)
    assert [s.p_safe for s in guard.score(MESSAGES, chunk=1)] == pytest.approx(expected, abs=1e-4)


def test_a_closed_turn_is_read_at_its_end():
    model, tokenizer = tiny_classifier("llama"), causal_tokenizer(CLOSED)
    guard = load_guard({"base": "causal-classifier", "open_turn": False}, model=model, tokenizer=tokenizer)
    expected = naive(model, tokenizer, [chatted(p, "<|im_end|>\n") for p in partials(3)], add_special_tokens=False)
    assert [s.p_safe for s in guard.score(MESSAGES, chunk=3)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "row", "forwarded"),
    [
        (byte_bpe, {"base": "causal-classifier"}, 1),
        # "fox jumps" is one token: the cut inside it, after "fox", has other tokens and a forward of its own.
        (added_tokens, {"base": "causal-classifier"}, 2),
        (byte_bpe, {"base": "causal-classifier", "one_pass": False}, 11),
    ],
)
def test_one_pass_forwards_the_answer_once(make, row, forwarded):
    model = tiny_classifier("llama")
    guard = load_guard(row, model=model, tokenizer=causal_tokenizer(make=make))
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    assert len(guard.score(MESSAGES, chunk=1)) == 11
    assert sum(seen) == forwarded


@pytest.mark.parametrize("row", ["causal-classifier", {"base": "causal-classifier", "one_pass": False}])
@pytest.mark.parametrize("pad", [0, None])
def test_batches_and_windows_change_nothing(row, pad):
    guard = load_guard(row, model=tiny_classifier("llama", pad=pad), tokenizer=causal_tokenizer())
    rows = [conversation("what", " ".join(ANSWER.split()[:n])) for n in (1, 3, 11, 7, 5)]
    together = [s.p_safe for score in guard.score_many(rows, chunk=2) for s in score.spans]
    apart = [s.p_safe for score in guard.score_many(rows, chunk=2, batch_size=1, window=1) for s in score.spans]
    assert together == pytest.approx(apart, abs=1e-5)


def test_classes_and_their_weight():
    model, tokenizer = tiny_classifier("bert", ("toxic", "mild", "fine", "other")), bert_like()
    row = {"base": "classifier", "safe": "fine", "unsafe": "toxic", "controversial": "mild"}
    with torch.no_grad():
        toxic, mild, fine, _ = model(tokenizer(ANSWER, return_tensors="pt")["input_ids"]).logits[0].exp().tolist()
    for weight in (0.0, 0.5, 1.0):
        guard = load_guard({**row, "controversial_weight": weight}, model=model, tokenizer=tokenizer)
        found = guard.score(MESSAGES, chunk=99)[0].p_safe
        assert found == pytest.approx((fine + weight * mild) / (fine + mild + toxic), abs=1e-5)


def test_one_unsafe_class_is_a_sigmoid():
    model, tokenizer = tiny_classifier("bert", ("toxic",)), bert_like()
    guard = load_guard({"base": "classifier", "safe": [], "unsafe": "toxic"}, model=model, tokenizer=tokenizer)
    with torch.no_grad():
        logit = model(tokenizer(ANSWER, return_tensors="pt")["input_ids"]).logits[0, 0]
    assert guard.score(MESSAGES, chunk=99)[0].p_safe == pytest.approx(1 - torch.sigmoid(logit).item(), abs=1e-5)


def test_an_answer_that_is_too_long_has_no_score_and_the_others_have():
    model, tokenizer = tiny_classifier("bert", positions=40), bert_like()
    guard = load_guard("classifier", model=model, tokenizer=tokenizer)
    rows = [conversation("a", "one two"), conversation("a", "one " * 100), conversation("a", "two")]
    first, second, third = guard.score_many(rows)
    assert first.p_safe is not None
    assert third.p_safe is not None
    assert (second.p_safe, second.spans) == (None, ())
    assert second.error == "has 202 tokens, but the guard reads 40"
    with pytest.raises(ValueError, match="guard 'classifier': has 202 tokens"):
        guard.score(rows[1])
    assert [score.p_safe for score in guard.score_many(rows[1:2])] == [None]


def test_a_classifier_from_a_folder(tmp_path):
    model, tokenizer = tiny_classifier("bert"), bert_like()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = load_guard({"base": "classifier", "model": str(tmp_path), "name": "mine"})
    assert [s.p_safe for s in guard.score(MESSAGES)] == pytest.approx(naive(model, tokenizer, partials(5)), abs=1e-5)
    score = next(guard.score_many([MESSAGES], chunk=4))
    assert score.scorer["model"] == str(tmp_path)
    assert (score.scorer["guard"], score.scorer["chunk"], score.scorer["unit"]) == ("mine", 4, "words")


def leaky():
    """A causal classifier made to look at later tokens."""
    model = tiny_classifier("llama")

    def look(module, args, output):
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.model.register_forward_hook(look)
    return model


def test_bad_classifiers_are_refused_in_one_sentence():
    tokenizer = causal_tokenizer()
    with pytest.raises(ValueError, match=r"one_pass needs a causal classifier, and BertForSequenceClass.* is not one"):
        load_guard("causal-classifier", model=tiny_classifier("bert"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="one_pass needs a causal classifier, and this one looks at later tokens"):
        load_guard("causal-classifier", model=leaky(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the classifier has no class 'safe'; it has: a, b"):
        load_guard("classifier", model=tiny_classifier("bert", ("a", "b")), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a loaded guard model needs its tokenizer"):
        load_guard("classifier", model=tiny_classifier("bert"))
    with pytest.raises(ValueError, match="has no weights of its own"):
        load_guard("classifier")
    with pytest.raises(ValueError, match="the tokenizer has no chat template, and the row gives none"):
        load_guard("causal-classifier", model=tiny_classifier("llama"), tokenizer=bert_like())
    guard = load_guard("classifier", model=tiny_classifier("bert"), tokenizer=bert_like())
    with pytest.raises(ValueError, match="row 1: the assistant's answer is empty"):
        list(guard.score_many([conversation("a", "b"), conversation("a", " ")]))
