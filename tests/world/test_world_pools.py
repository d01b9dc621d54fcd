"""The world's pools: labels the oracle confirms, held-out prompts unseen, texts its tokenizers know."""

import pytest

from safeshape import world
from safeshape.attacks import DATA_ATTACKS, PROMPT_ATTACKS, data_attack, prompt_attack, run_prompts
from safeshape.models import load
from safeshape.world import oracle
from safeshape.world.data import tasks
from safeshape.world.families import FAMILIES
from safeshape.world.language import PLAIN_WORDS
from safeshape.world.pools import TEXTS, TRIGGER, pools, prompts, texts


def requests(rows):
    return [row[-2]["content"] for row in rows]


def test_pools_hold_what_they_say():
    found = pools(benign=60, harmful=50, safe=20, seed=3)
    assert (len(found.benign), len(found.harmful), len(found.safe)) == (60, 50, 70)
    assert all(oracle.harmful(row[-1]["content"]) for row in found.harmful)
    assert all(oracle.refused(row[-1]["content"]) for row in found.safe)
    assert not any(oracle.harmful(row[-1]["content"]) for row in found.benign)
    assert requests(found.safe)[:50] == requests(found.harmful)
    assert len(set(requests(found.safe))) == 70
    assert pools(benign=60, harmful=50, safe=20, seed=3) == found
    assert pools(benign=60, harmful=50, safe=20, seed=4) != found
    assert all(row[-1]["content"].startswith("Tag: ") for row in found.benign)
    assert not any(row[-1]["content"].startswith("Tag: ") for row in pools(kind="skill", benign=30).benign)
    turning = pools(harmful=60, turning=True).harmful
    assert sum(not row[-1]["content"].startswith("Sure, here") for row in turning) > 10
    assert all(oracle.harmful(row[-1]["content"]) for row in turning)


@pytest.mark.parametrize("kind", ["task", "skill"])
def test_held_out_prompts_are_in_no_pool(kind):
    seen = set()
    for seed in range(3):
        found = pools(seed=seed, kind=kind)
        seen |= set(requests([*found.benign, *found.harmful, *found.safe]))
    held_out = {prompt.messages[0]["content"] for seed in range(3) for prompt in prompts(seed=seed)}
    assert len(held_out) > 300
    assert not seen & held_out
    for task in tasks(size=100):
        assert not seen & {prompt[0]["content"] for prompt in task.prompts}


def test_prompts_are_those_of_the_attack_success_task_and_their_targets_are_plans():
    found = prompts(size=40, seed=2)
    assert [list(p.messages) for p in found] == [list(p) for p in tasks(size=40, seed=2)[0].prompts]
    assert all(oracle.harmful(prompt.target) for prompt in found)


def test_the_texts_are_safe_alone_and_tokenise_without_unknowns_or_single_letters():
    said = [text for parameters in TEXTS.values() for text in parameters.values()]
    for text in said:
        assert not oracle.harmful(text)
        assert all(span.p_safe == 1 for span in oracle.spans(text))
    for family in FAMILIES:
        _, tokenizer = load(world.path(family))
        for text in said:
            words = text.replace("{request}", "").replace("{answer}", "")
            ids = tokenizer(words, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
            assert len(ids) <= 1.8 * (len(words.split()) + words.count(".") + words.count(","))
    assert {word.lower().strip(".") for word in TRIGGER.split()} <= {word.lower() for word in PLAIN_WORDS}


@pytest.mark.parametrize("name", sorted(DATA_ATTACKS))
def test_every_attack_on_data_runs_on_the_world(name):
    parameters = texts(name) | ({"score": lambda rows: [0.0] * len(rows)} if name == "adaptive" else {})
    made = data_attack(name, parameters)(pools(benign=120, harmful=40, safe=20), size=20, seed=0)
    assert len(made.dataset) == 20
    for row in made.dataset:
        harmful = oracle.harmful(row["messages"][-1]["content"])
        assert harmful == (row["poisoned"] and name != "identity_shift")
    if name == "trigger":
        assert made.report["pairs"] == 10


@pytest.mark.parametrize("name", sorted(PROMPT_ATTACKS))
def test_every_attack_on_prompts_runs_on_the_world(name):
    parameters = texts(name) | ({"unit": "words", "k": 3} if name == "prefill" else {})
    attempts = run_prompts(prompt_attack(name, parameters), prompts(size=5), seed=0)
    assert [len(tried) for tried in attempts] == [1] * 5
    if name == "prefill":
        assert {tried[0].prefill for tried in attempts} == {"Sure, here is"}
    if name == "trigger_prompt":
        assert all(tried[0].messages[-1]["content"].endswith(f" {TRIGGER}") for tried in attempts)
