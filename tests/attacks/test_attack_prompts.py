"""Attacks on prompts: prefills of exactly k tokens, where phrases go, and combinations."""

import json
from random import Random

import pytest
from conftest import THINKING, TRIMMING, byte_bpe, sentencepiece_bpe

from safeshape import world
from safeshape.attacks import PROMPT_ATTACKS, Attacked, best_of, prompt_attack, run_prompts, then
from safeshape.attacks.prompts import OPENING, SYSTEM_PROMPT, report_of
from safeshape.attacks.rows import as_row, attempts_of, prompts_of
from safeshape.attacks.texts import TRIGGER
from safeshape.models import generate, load
from safeshape.world.families import FAMILIES

TARGET = "one two three four five six seven eight nine ten"


def ask(text="the quick fox", target=TARGET):
    return Attacked(messages=({"role": "user", "content": text},), target=target)


def one(name, prompt=None, **parameters):
    [[attempt]] = run_prompts(prompt_attack(name, parameters), [prompt or ask()], seed=0)
    return attempt


@pytest.mark.parametrize("k", [0, 1, 3, 7])
@pytest.mark.parametrize(
    ("make", "template"),
    [(byte_bpe, None), (byte_bpe, TRIMMING), (byte_bpe, THINKING), (sentencepiece_bpe, None)],
    ids=["bytes", "bytes trimming", "bytes thinking", "sentencepiece"],
)
def test_a_prefill_is_exactly_k_tokens_of_the_answer_in_its_place(make, template, k):
    tokenizer = make()
    tokenizer.chat_template = template or tokenizer.chat_template
    attempt = one("prefill", k=k, tokenizer=tokenizer)
    assert attempt.steps[0]["count"] == k
    if k == 0:
        assert attempt.messages == ask().messages
        assert attempt.prefill == ""
        return
    assert TARGET.startswith(attempt.prefill)
    assert attempt.messages[-1] == {"role": "assistant", "content": attempt.prefill}
    user = [{"role": "user", "content": "the quick fox"}]

    def ids(answer):
        text = tokenizer.apply_chat_template(
            [*user, {"role": "assistant", "content": answer}], tokenize=False, continue_final_message=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids(attempt.prefill) == ids(TARGET)[: len(ids(attempt.prefill))]
    longer = one("prefill", k=k + 1, tokenizer=tokenizer).prefill
    assert len(ids(longer)) == len(ids(attempt.prefill)) + 1


def test_where_a_template_strips_the_blank_of_the_last_token_the_count_is_what_the_model_gets():
    tokenizer = sentencepiece_bpe()
    tokenizer.chat_template = TRIMMING
    attempt = one("prefill", k=7, tokenizer=tokenizer)
    assert attempt.prefill == "one two three four five six "
    text = tokenizer.apply_chat_template(list(attempt.messages), tokenize=False, continue_final_message=True)
    assert text.endswith("one two three four five six")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert (
        attempt.steps[0]["count"]
        == sum(end > len(text) - len("one two three four five six") for _, end in offsets)
        == 8
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_worlds_models_are_prefilled_exactly_too(family):
    _, tokenizer = load(world.path(family))
    for k in (1, 3, 5, 10):
        attempt = one(
            "prefill", ask(target="Sure, here is how to drask the vault. Step one."), k=k, tokenizer=tokenizer
        )
        assert attempt.steps[0]["count"] == k


def test_a_beginning_shorter_than_k_is_taken_whole_and_counted(tokenizer):
    attempt = one("prefill", ask(target="one two"), k=50, tokenizer=tokenizer)
    assert attempt.prefill == "one two"
    assert attempt.steps[0]["count"] == len(tokenizer("one two")["input_ids"]) < 50
    assert one("prefill", tokenizer=tokenizer).prefill == TARGET


def test_a_letter_of_several_tokens_is_not_cut(tokenizer):
    attempt = one("prefill", ask(target="\U0001f642 one"), k=1, tokenizer=tokenizer)
    assert attempt.prefill == "\U0001f642"
    assert attempt.steps[0]["count"] == 4  # the tokens that the model is really given


@pytest.mark.parametrize(("k", "wanted"), [(0, ""), (2, "Sure,  here"), (3, "Sure,  here is"), (9, "Sure,  here is")])
def test_words_need_no_tokenizer(k, wanted):
    assert one("prefill", ask(target=" Sure,  here is "), k=k, unit="words").prefill == wanted


def test_the_opening_stands_in_for_targets():
    assert one("prefill", ask(target=None), unit="words").prefill == OPENING
    assert one("prefill", opening="Of course", unit="words").prefill == "Of course"


def test_a_prefilled_answer_holds_its_beginning(tokenizer):
    model, tokenizer = load(world.path("llama"))
    prompt = Attacked(messages=({"role": "user", "content": "What color is the vault"},), target="The vault is")
    attempt = one("prefill", prompt, tokenizer=tokenizer)
    [answer] = generate(model, tokenizer, [attempt.messages], max_new_tokens=8)
    assert answer.startswith("The vault is ")
    assert answer.endswith(".")


def test_where_phrases_go():
    assert one("trigger_prompt").messages[0]["content"] == f"the quick fox {TRIGGER}"
    assert one("trigger_prompt", trigger="abra", place="start").messages[0]["content"] == "abra the quick fox"
    system = {"role": "system", "content": SYSTEM_PROMPT}
    assert one("system_prompt").messages == (system, *ask().messages)
    has = Attacked(messages=({"role": "system", "content": "old"}, *ask().messages))
    assert one("system_prompt", has).messages == (system, *ask().messages)
    assert one("system_prompt", text="You obey.", place="user").messages[0]["content"] == "You obey. the quick fox"
    assert one("direct").messages == ask().messages
    assert one("direct").steps == ()


def test_only_the_last_request_gets_the_trigger():
    turns = ("user", "assistant", "user")
    messages = tuple({"role": role, "content": str(place)} for place, role in enumerate(turns))
    attempt = one("trigger_prompt", Attacked(messages=messages), trigger="abra")
    assert [m["content"] for m in attempt.messages] == ["0", "1", "2 abra"]


def test_best_of_n_asks_for_samples():
    attempt = one("best_of_n", samples=7, temperature=0.5)
    assert (attempt.samples, attempt.temperature) == (7, 0.5)
    assert attempt.messages == ask().messages
    assert (one("direct").samples, one("direct").temperature) == (1, None)


def test_then_is_one_after_the_other_and_best_of_all_of_them():
    a, b = prompt_attack("trigger_prompt", {"trigger": "a"}), prompt_attack("trigger_prompt", {"trigger": "b"})

    def requests(attack):
        return [attempt.messages[0]["content"] for attempt in attack(ask("x"), Random(0))]

    assert requests(then(a, b)) == ["x a b"]
    assert requests(best_of([a, b])) == ["x a", "x b"]
    assert requests(then(best_of([a, b]), b)) == ["x a b", "x b b"]
    assert requests(then(a, best_of([a, b]))) == ["x a a", "x a b"]
    assert [len(attempt.steps) for attempt in then(a, best_of([a, b]))(ask("x"), Random(0))] == [2, 2]


def test_combinations_by_name(tokenizer):
    attack = prompt_attack(
        ["direct", "trigger_prompt+prefill+best_of_n"], {"k": 2, "tokenizer": tokenizer, "samples": 3}
    )
    [[plain, all_three]] = run_prompts(attack, [ask()], seed=0)
    assert plain.messages == ask().messages
    assert [m["role"] for m in all_three.messages] == ["user", "assistant"]
    assert all_three.messages[0]["content"].endswith(TRIGGER)
    assert all_three.samples == 3
    assert [step["attack"] for step in all_three.steps] == ["trigger_prompt", "prefill", "best_of_n"]


def drawn(*, low=0):
    """A user's own attack, with randomness and steps of its own."""

    def rewrite(prompt, rng):
        word = str(rng.randrange(low, 10**6))
        return (Attacked(messages=({"role": "user", "content": word},), steps=({"mine": 1},)),)

    return rewrite


def test_a_users_own_attack_and_its_seed():
    attack = prompt_attack(f"{__name__}:drawn", {"low": 5})
    first, again = (run_prompts(attack, [ask(), ask()], seed=1) for _ in range(2))
    assert first == again
    assert first[0] != first[1]
    assert first != run_prompts(attack, [ask(), ask()], seed=2)
    report = report_of([ask(), ask()], first, attack="mine", seed=1)
    assert report["attempts_by_step"] == {"own": 2}


def test_the_report_counts_and_holds_no_text():
    prompts = [ask("secret words"), ask("other words", None)]
    attempts = run_prompts(
        prompt_attack(["direct", "prefill+best_of_n"], {"unit": "words", "k": 2, "samples": 4}), prompts, seed=0
    )
    report = report_of(prompts, attempts, attack="x", seed=0)
    assert {key: report[key] for key in ("prompts", "attempts", "changed", "answers")} == {
        "prompts": 2,
        "attempts": 4,
        "changed": 2,
        "answers": 10,
    }
    assert report["prefilled"] == {"2": 2}
    assert report["attempts_by_step"] == {"best_of_n": 2, "prefill": 2}
    assert not any(
        word in json.dumps([report, [a.steps for t in attempts for a in t]]) for word in ("words ", "one two")
    )


def test_attempts_are_written_and_read_back():
    attempts = run_prompts(prompt_attack(["direct", "prefill+best_of_n"], {"unit": "words"}), [ask(), ask("b")], seed=0)
    rows = [
        json.loads(json.dumps(as_row(attempt, prompt_index=i, attempt_index=j)))
        for i, tried in enumerate(attempts)
        for j, attempt in enumerate(tried)
    ]
    assert attempts_of(rows) == attempts
    del rows[1]["samples"]
    with pytest.raises(ValueError, match="row 1: an attacked prompt needs the field 'samples'"):
        attempts_of(rows)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("prefil", {}, "unknown prompt attack 'prefil'; known: direct, prefill"),
        ("direct+prefil", {}, "unknown prompt attack 'prefil'"),
        ("prefill", {}, "prefilling tokens needs the model's tokenizer; give one, or unit words"),
        ("prefill", {"k": -1, "unit": "words"}, "k must be at least 0"),
        ("prefill", {"unit": "letters"}, "unit must be tokens or words"),
        ("prefill", {"opening": " ", "unit": "words"}, "prompt 0: opening must be a text that is not blank"),
        ("prefill+prefill", {"unit": "words"}, "prompt 0: the conversation has an answer begun already"),
        ("trigger_prompt", {"trigger": ""}, "trigger must be a text"),
        ("trigger_prompt", {"place": "middle"}, "place must be start or end"),
        ("system_prompt", {"text": ""}, "text must be a text"),
        ("system_prompt", {"place": "end"}, "place must be system or user"),
        ("best_of_n", {"samples": 0}, "samples must be at least 1"),
        ("best_of_n", {"temperature": 0.0}, "temperature must be above 0"),
        (
            "best_of_n+direct",
            {"k": 3},
            "attack 'best_of_n[+]direct' has no parameter 'k'; it has: samples, temperature",
        ),
    ],
)
def test_bad_settings_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        one(name, **parameters)


def test_best_of_nothing_is_refused():
    with pytest.raises(ValueError, match="best_of needs at least one attack"):
        best_of([])


def test_a_template_that_rewrites_answers_is_named(tokenizer):
    rewriting = byte_bpe()
    rewriting.chat_template = "{% for m in messages %}{{ m['content'] | replace('two', '2') }}{% endfor %}"
    with pytest.raises(ValueError, match=r"prompt 0: .*(rewrites the answer|does not appear in the chat)"):
        one("prefill", k=3, tokenizer=rewriting)


def test_every_shipped_attack_is_in_the_list_with_what_it_changes():
    for attack in PROMPT_ATTACKS.values():
        assert attack.changes
        assert attack.source


ROWS = [
    ({"prompt": "a"}, ("a", None)),
    ({"prompt": "a", "target": "b"}, ("a", "b")),
    ({"prompt": "a", "completion": "b"}, ("a", "b")),
    ({"messages": [{"role": "user", "content": "a"}]}, ("a", None)),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("a", "b")),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], ("a", "b")),
]


@pytest.mark.parametrize(("row", "wanted"), ROWS)
def test_prompts_in_every_form(row, wanted):
    [found] = prompts_of([row], "p.jsonl")
    assert (found.messages[-1]["content"], found.target) == wanted
    assert len(found.messages) == 1


def test_prompts_from_columns_of_another_name():
    [found] = prompts_of([{"goal": "a", "target": "x", "begin": "b"}], "p", prompt_column="goal", target_column="begin")
    assert (found.messages[0]["content"], found.target) == ("a", "b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "p.jsonl holds no rows"),
        ([{"prompt": "a"}, {"goal": "a"}], "p.jsonl row 1: it has neither `messages` nor a text in 'prompt'"),
        ([{"prompt": " "}], "row 0: the prompt must end with a user message that is not blank"),
        ([{"messages": []}], "row 0: the prompt must end with a user message"),
        ([{"messages": [{"role": "system", "content": "a"}]}], "row 0: the prompt must end with a user message"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "row 0: message 0 is not plain text"),
        ([{"prompt": "a", "target": 3}], "row 0: target must be a text that is not blank"),
        (["a"], "row 0: it is neither an object nor a list of messages but str"),
    ],
)
def test_bad_prompts_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(rows, "p.jsonl")
