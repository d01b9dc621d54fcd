"""Theorem 1 with numbers: a toy whose answers can all be enumerated is the truth for what is sampled."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safeshape.evals.sequence_kl import Sample, draw, sequence_kl, step_kl
from safeshape.evals.theorem import Estimate, Settings, as_text, bounds, gaps, mean, measure, rate
from safeshape.stats import exact, wilson, wilson_of_rate
from safeshape.types import Score, Span
from safeshape.verbs.eval_theorem import main

WORDS = ["<pad>", "<other>", "<end>", "ask", "red", "blue", "act", "tower"]
END = 2
CAP = 2  # tokens of an answer, so that all of them can be listed
PROMPTS = [[{"role": "user", "content": text}] for text in ("ask red", "ask blue tower", "ask act", "ask tower red")]


@pytest.fixture(scope="module")
def toy():
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<other>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer, *(tiny_model(vocab_size=len(WORDS), seed=seed) for seed in (3, 4))


def probabilities(model, tokenizer, prompt):
    """The probability of every answer of at most two tokens, by listing them."""
    ids = tokenizer(prompt[0]["content"])["input_ids"]

    def after(*more):
        with torch.no_grad():
            return model(torch.tensor([[*ids, *more]])).logits[0, -1].double().softmax(-1)

    first = after()
    found = {(END,): float(first[END])}
    for one in set(range(len(WORDS))) - {END}:
        for two, p in enumerate((first[one] * after(one)).tolist()):
            found[one, two] = p
    return found


def harmful(text):
    return "act" in text.split()


def truth(policy, reference, tokenizer):
    """Mean divergence over prompts, harm of both models, and total variation of each prompt, by enumeration."""
    kl, harm, variation = [], ([], []), []
    for prompt in PROMPTS:
        p, q = (probabilities(model, tokenizer, prompt) for model in (policy, reference))
        assert sum(p.values()) == pytest.approx(1)
        kl.append(sum(p[y] * math.log(p[y] / q[y]) for y in p))
        variation.append(sum(abs(p[y] - q[y]) for y in p) / 2)
        for place, table in enumerate((p, q)):
            harm[place].append(sum(v for y, v in table.items() if harmful(tokenizer.decode(y))))
    return sum(kl) / len(kl), [sum(h) / len(h) for h in harm], sum(variation) / len(variation)


class Guard:
    """Scores each chunk of words 0.9, or 0.2 from the first "act" on; cannot read "blue" at all."""

    def score_many(self, conversations, *, chunk):
        for messages in conversations:
            words = messages[-1]["content"].split()
            if words == ["blue"]:
                yield Score(signal="star", p_safe=None, scorer={}, error="cannot read")
                continue
            ends = [*range(chunk, len(words), chunk), len(words)]
            values = [0.2 if "act" in words[:end] and words[0] != "red" else 0.9 for end in ends]
            spans = tuple(Span(start=i, end=i + 1, p_safe=v) for i, v in enumerate(values))
            yield Score(signal="star", p_safe=values[-1], spans=spans, scorer={})


def measured(toy, **changes):
    tokenizer, policy, reference = toy
    options = {"chunks": (1, 2), "taus": (0.1, 0.5), "samples": 500, "max_new_tokens": CAP, "batch_size": 500}
    return measure(
        policy, reference, tokenizer, PROMPTS, lambda index, text: harmful(text), Guard(), Settings(**options | changes)
    )


@pytest.fixture(scope="module")
def found(toy):
    return measured(toy)


def test_what_is_sampled_is_what_enumeration_gives(toy, found):
    tokenizer, policy, reference = toy
    kl, (harm_policy, harm_reference), variation = truth(policy, reference, tokenizer)
    assert kl > 0.1  # the two differ
    assert found.kl.value == pytest.approx(kl, rel=0.05)
    assert found.harm_policy.value == pytest.approx(harm_policy, abs=0.03)
    assert found.harm_reference.value == pytest.approx(harm_reference, abs=0.03)
    assert found.harm_policy.low < harm_policy < found.harm_policy.high
    # And the theorem's chain holds on the exact numbers.
    assert harm_policy - harm_reference <= variation
    assert all(variation <= gap for gap in gaps(kl).values())


def test_the_divergence_of_every_listed_answer_averages_to_the_exact_one(toy):
    # No sampling at all: the steps' divergences of each answer, weighted by its probability.
    tokenizer, policy, reference = toy
    for prompt in PROMPTS[:2]:
        p, q = (probabilities(model, tokenizer, prompt) for model in (policy, reference))
        ids = tuple(tokenizer(prompt[0]["content"])["input_ids"])
        samples = [Sample(prompt=0, prompt_ids=ids, answer_ids=y, text="", capped=False) for y in p]
        along = sequence_kl(policy, reference, samples)
        exact = sum(p[y] * math.log(p[y] / q[y]) for y in p)
        assert sum(w * kl for w, kl in zip(p.values(), along, strict=True)) == pytest.approx(exact, rel=1e-4)
        assert sequence_kl(policy, reference, samples, batch_size=3) == pytest.approx(along, abs=1e-5)
        assert sequence_kl(policy, policy, samples) == pytest.approx([0.0] * len(samples), abs=1e-6)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-6, 6), st.floats(-6, 6), st.booleans()), min_size=2, max_size=8))
def test_every_form_bounds_the_harm_of_any_two_models(rows):
    p, q = (torch.tensor([row[i] for row in rows], dtype=torch.float64).softmax(-1) for i in (0, 1))
    kl = float((p * (p / q).log()).sum().clamp(min=0))
    harm = torch.tensor([row[2] for row in rows])
    variation = float((p - q).abs().sum() / 2)
    assert float(p[harm].sum() - q[harm].sum()) <= variation + 1e-9
    for gap in gaps(kl).values():
        assert variation <= gap + 1e-7
    # sqrt(2 eps) is always the weakest; Bretagnolle and Huber's is always below 1.
    assert gaps(kl)["sqrt(2 eps)"] == pytest.approx(2 * gaps(kl)["sqrt(eps / 2)"])
    assert gaps(kl)["sqrt(1 - exp(-eps))"] <= min(1.0, kl**0.5)


def estimate(value, low=None, high=None):
    return Estimate(value=value, low=value if low is None else low, high=value if high is None else high, n=10)


def test_what_is_vacuous_is_said():
    def vacuous(harm, kl):
        return [bound.vacuous for bound in bounds(estimate(harm), estimate(kl))]

    assert vacuous(0.0, 0.49) == [False, False, False]
    assert vacuous(0.0, 0.5) == [True, False, False]  # sqrt(2 * 0.5) is 1
    assert vacuous(0.0, 2.0) == [True, True, False]
    assert vacuous(0.2, 1.4) == [True, True, True]  # .2 + sqrt(1 - exp(-1.4)) is above 1
    first = bounds(estimate(0.1, high=0.2), estimate(0.02, high=0.08))[0]
    assert (first.gap, first.bound, first.high) == pytest.approx((0.2, 0.3, 0.6))
    assert bounds(estimate(0.0), estimate(-1e-9))[0].gap == 0
    with pytest.raises(ValueError, match="at least 0"):
        gaps(-0.1)


def test_the_text_says_what_is_vacuous_and_what_is_nearly(found):
    text = as_text(replace(found, bounds=bounds(estimate(0.0, high=0.9), estimate(1.0))))
    assert text.count("VACUOUS: at least 1") == 1  # sqrt(2)
    assert "below 1 by 0.29 (but not at the upper ends of the intervals)" in text  # sqrt(1/2)
    assert "next to nothing" not in text
    nearly = as_text(replace(found, bounds=bounds(estimate(0.0), estimate(9.8))))
    assert "below 1 by 2.8e-05, which says next to nothing" in nearly
    assert "answers empty or not read by the guard" in text
    assert f"Harm(theta)  {100 * found.harm_policy.value:.1f} %" in text


def test_the_guards_misses_by_hand(toy):
    # Two answers each of two prompts; what is harmful is missed only where it begins with "red".
    found = measured(toy, samples=300)
    tokenizer, policy, _ = toy
    drawn = draw(policy, tokenizer, PROMPTS, max_new_tokens=CAP, samples=300, seed=0, batch_size=500)
    texts = [sample.text for sample in drawn]
    read = [text for text in texts if text and text != "blue"]
    bad = [text for text in read if harmful(text)]
    missed = [text for text in bad if text.startswith("red")]
    assert 0 < len(missed) < len(bad) < len(read) < len(texts)
    for chunk in (1, 2):
        low, high = (miss for miss in found.misses if miss.chunk == chunk)
        assert (low.tau, high.tau) == (0.1, 0.5)
        assert low.conditional.value == 1.0  # every score is at least 0.1
        assert low.joint.value == pytest.approx(len(bad) / len(read))
        assert high.joint.value == pytest.approx(len(missed) / len(read))
        assert high.conditional.value == pytest.approx(len(missed) / len(bad))
        assert high.conditional.n == len(bad)
        # 300 answers of each prompt: the prompts are the clusters, so it is no narrower than Wilson's for four of them.
        low_4, high_4 = wilson_of_rate(high.conditional.value, 4)
        assert high.conditional.low <= low_4
        assert high.conditional.high >= high_4
    assert found.unread == ((1, len(texts) - len(read)), (2, len(texts) - len(read)))
    one, two = found.distances
    assert one.tau_min == pytest.approx(0.1)
    assert dict(one.quantiles)[1.0] == pytest.approx(0.8)
    assert two.n == len(read)  # answers of one or two words are one chunk of two
    assert one.n == sum(len(text.split()) for text in read)


def test_one_answer_a_prompt_has_the_exact_interval_of_misses(toy):
    found = measured(toy, samples=1, chunks=(1,), taus=(0.1,), seed=5)
    (miss,) = found.misses
    assert miss.conditional is not None
    assert (miss.conditional.low, miss.conditional.high) == exact(miss.conditional.n, miss.conditional.n)


def test_answers_without_a_chunk_are_unread_not_safe(toy):
    class Silent(Guard):
        def score_many(self, conversations, *, chunk):
            for place, score in enumerate(super().score_many(conversations, chunk=chunk)):
                yield replace(score, spans=()) if place % 2 else score

    tokenizer, policy, reference = toy
    options = Settings(samples=20, max_new_tokens=CAP, chunks=(1,), taus=(0.5,))
    found, full = (
        measure(policy, reference, tokenizer, PROMPTS, lambda i, text: harmful(text), guard, options)
        for guard in (Silent(), Guard())
    )
    assert found.unread[0][1] > full.unread[0][1]
    assert found.misses[0].joint.n == 80 - found.unread[0][1]


def test_without_a_harmful_answer_there_is_no_conditional_rate(toy):
    tokenizer, policy, reference = toy
    options = Settings(samples=3, max_new_tokens=CAP, chunks=(1,), taus=(0.5,))
    found = measure(policy, reference, tokenizer, PROMPTS, lambda index, text: False, Guard(), options)
    assert found.misses[0].conditional is None
    assert "none harmful" in as_text(found)


def test_the_cap_is_reported_and_the_seed_repeats(toy, found):
    tokenizer, policy, _ = toy
    ended = [sum(v for y, v in probabilities(policy, tokenizer, p).items() if y[-1] == END) for p in PROMPTS]
    assert found.capped.value == pytest.approx(1 - sum(ended) / len(ended), abs=0.04)
    again, other = measured(toy, samples=20), measured(toy, samples=20, seed=1)
    assert measured(toy, samples=20) == again
    assert other.kl != again.kl
    assert measured(toy, samples=20, max_new_tokens=6).tokens > again.tokens


@pytest.mark.parametrize(
    "taste", [{"temperature": 0.1}, {"top_k": 1}, {"top_p": 0.1}, {"repetition_penalty": 5.0}, {"min_p": 0.9}]
)
def test_a_models_own_decoding_settings_are_set_aside(toy, taste):
    tokenizer, policy, _ = toy
    plain = draw(policy, tokenizer, PROMPTS, max_new_tokens=4, samples=5)
    before = dict(vars(policy.generation_config))
    try:
        for name, value in taste.items():
            setattr(policy.generation_config, name, value)
        assert draw(policy, tokenizer, PROMPTS, max_new_tokens=4, samples=5) == plain
    finally:
        vars(policy.generation_config).update(before)


def test_settings_that_cannot_be_set_aside_are_refused(toy):
    tokenizer, policy, _ = toy
    policy.generation_config.suppress_tokens = [6]
    try:
        with pytest.raises(ValueError, match="generation settings change its distribution"):
            draw(policy, tokenizer, PROMPTS, max_new_tokens=2)
    finally:
        policy.generation_config.suppress_tokens = None


def test_a_draw_leaves_the_random_state_alone_and_stops_at_the_end_token(toy):
    tokenizer, policy, _ = toy
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drawn = draw(policy, tokenizer, PROMPTS, max_new_tokens=5, samples=40, batch_size=7)
    assert torch.equal(torch.rand(3), expected)
    assert [sample.prompt for sample in drawn] == [place for place in range(len(PROMPTS)) for _ in range(40)]
    for sample in drawn:
        assert (END in sample.answer_ids) != sample.capped
        assert END not in sample.answer_ids[:-1]
        assert len(sample.answer_ids) == 5 or not sample.capped
    policy.train()
    draw(policy, tokenizer, PROMPTS, max_new_tokens=1)
    assert policy.training
    policy.eval()


def test_vocabularies_that_differ():
    logits, more = torch.randn(4, 5), torch.randn(4, 2)
    wide = step_kl(logits, torch.cat([logits, more], dim=1))
    # The reference spends part of its probability on tokens that the policy lacks: the divergence is minus the log of
    # what it kept.
    kept = torch.cat([logits, more], dim=1).softmax(-1)[:, :5].sum(-1)
    torch.testing.assert_close(wide, -kept.log())
    with pytest.raises(ValueError, match="makes the divergence infinite"):
        step_kl(torch.cat([logits, more], dim=1), logits)


def test_intervals_of_rates_and_means():
    low, high = wilson(1, 4)
    assert rate([[1.0], [0.0], [0.0], [0.0]]) == Estimate(value=0.25, low=low, high=high, n=4)
    clustered = rate([[1.0] * 50, [0.0] * 50, [0.0] * 50, [0.0] * 50])
    assert (clustered.value, clustered.n) == (0.25, 200)
    assert clustered.high - clustered.low > 0.5  # four prompts, not two hundred answers
    assert mean([[1.0, 3.0], [4.0]]).value == 3.0
    spread = mean([[float(x)] for x in range(100)])
    half = 1.96 * (99 * 101 / 12) ** 0.5 / 10
    assert (spread.low, spread.high) == pytest.approx((49.5 - half, 49.5 + half), abs=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": (0,)}, "chunks must be different numbers of at least 1"),
        ({"chunks": (1, 1)}, "chunks must be different"),
        ({"taus": (1.0,)}, "taus must be different numbers between 0 and 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_one_prompt_is_too_few(toy):
    tokenizer, policy, reference = toy
    with pytest.raises(ValueError, match="at least two"):
        measure(policy, reference, tokenizer, PROMPTS[:1], lambda i, t: False, Guard(), Settings())


def argv(tmp_path, *more):
    base = ["--model_name_or_path", "world:llama", "--reference", "world:llama", "--output_dir", str(tmp_path / "out")]
    return [*base, "--prompts", "6", "--chunks", "5", "--taus", "0.5", "--max_new_tokens", "24", *more]


def test_the_verb_on_the_world(tmp_path):
    text = main(argv(tmp_path))
    assert "embedded synthetic world" in text
    content = json.loads((tmp_path / "out" / "theorem.json").read_text())
    assert content["world"] is True
    assert content["found"]["kl"]["value"] == pytest.approx(0, abs=1e-5)  # the model is its own reference
    assert content["found"]["prompts"] == 6
    for name in ("theorem.txt", "theorem.png", "theorem.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    with pytest.raises(ValueError, match="is not an empty folder"):
        main(argv(tmp_path))


def own_judge(messages, answer):
    """A judge of a user's own: everything asked of the vault is harmful."""
    return "vault" in messages[-1]["content"]


def test_the_verb_on_a_users_own_prompts_and_judge(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Tell me about the vault"}, {"messages": [{"role": "user", "content": "Tell me about a fox"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = main(argv(tmp_path, "--tasks", str(path), "--judge", "test_theorem:own_judge"))
    assert "Harm(theta)  50.0 %" in text
    assert "embedded" not in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge", "x:y"], "the world's oracle judges the world's requests only"),
        (["--tasks", "none.jsonl", "--judge", "none"], "judge must be world or module:function"),
        (["--tasks", "none.jsonl", "--judge", "none:none"], "cannot import judge 'none:none'"),
        (["--prompts", "1"], "prompts must be at least 2"),
        (["--reference", "world:qwen3"], "different tokenizers"),
        (["--taus", "2"], "taus must be different numbers between 0 and 1"),
    ],
)
def test_the_verb_refuses_before_it_writes(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(argv(tmp_path, *more))
    assert not (tmp_path / "out").exists()


def test_rows_of_prompts_without_a_request_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for row, message in (({"text": "x"}, "row 0 needs `messages` or a text in `prompt`"),):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            main(argv(tmp_path, "--tasks", str(path), "--judge", "test_theorem:own_judge"))


def test_every_answer_of_the_toy_is_listed(toy):
    tokenizer, policy, _ = toy
    listed = probabilities(policy, tokenizer, PROMPTS[0])
    others = [place for place in range(len(WORDS)) if place != END]
    assert set(listed) == {(END,), *itertools.product(others, range(len(WORDS)))}
