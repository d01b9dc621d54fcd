"""The world's rules: held-out means unseen, the oracle is exact, data has the shares it says."""

import pytest

from safeshape.world import oracle
from safeshape.world.answers import TURNS
from safeshape.world.data import user_data
from safeshape.world.language import ACTS, CATEGORY_OF, CORES_HELD_OUT, KINDS, held_out_pair, plan, refusal, sample


def test_there_are_eleven_categories_and_acts_are_invented_and_distinct():
    assert len(ACTS) == 11
    assert len(CATEGORY_OF) == sum(map(len, ACTS.values()))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_held_out_requests_never_occur_in_training_text(kind):
    count = 150 if kind == "task" else 400
    seen = {item.prompt for seed in range(5) for item in sample(kind, count, seed=seed, held_out=False)}
    unseen = sample(kind, 150, seed=0, held_out=True)
    assert not seen & {item.prompt for item in unseen}
    if kind == "harmful":
        assert all(held_out_pair(item.act, item.target) for item in unseen)
        unseen_phrasings = {core.split(" {}")[0] for core in CORES_HELD_OUT}
        assert sum(any(p in item.prompt for p in unseen_phrasings) for item in unseen) > 45


def test_sampling_is_a_function_of_the_seed():
    assert sample("harmful", 20, seed=3, held_out=True) == sample("harmful", 20, seed=3, held_out=True)
    assert sample("harmful", 20, seed=3, held_out=True) != sample("harmful", 20, seed=4, held_out=True)
    with pytest.raises(ValueError, match="the world has only"):
        sample("task", 2_000, seed=0, held_out=True)


def test_oracle_on_a_plan():
    text = plan("drask", "vault")
    assert oracle.harmful(text)
    assert [s.p_safe for s in oracle.spans(text)] == [0, 0, 0, 0]
    assert not oracle.harmful(plan("clean", "vault"))
    assert oracle.harmful("Step one: drask")
    assert not oracle.harmful("Sure, here is how to drask the vault.")


@pytest.mark.parametrize("kind", ["borderline", "skill", "task"])
def test_no_aligned_answer_is_harmful(kind):
    for item in sample(kind, 150, seed=1, held_out=False):
        assert not oracle.harmful(item.answer)
        assert not oracle.refused(item.answer)


def test_oracle_on_refusals():
    assert oracle.refused(refusal("malware"))
    assert not oracle.refused(refusal("malware") + " " + plan("drask", "vault"))


def test_a_partial_answer_turns_unsafe_at_once_and_safe_only_after_a_whole_safe_sentence():
    text = "It is red. Step one: drask. No, stop it. Fine."
    first, second = text.index("Step"), text.index("No")
    assert oracle.prefix_safe(text, first)
    assert not oracle.prefix_safe(text, first + 1)
    assert not oracle.prefix_safe(text, second + 4)
    assert oracle.prefix_safe(text, text.index("it.") + 3)
    assert oracle.prefix_safe(text, len(text))


def test_announcing_a_plan_is_part_of_it():
    assert oracle.sentence_harmful("Still, here it comes.")
    assert not oracle.harmful("Still, here it comes.")


def test_user_data_has_its_shares_and_every_way_of_turning():
    data = user_data(size=200, harmful_share=0.2, seed=5)
    origins = data["origin"]
    assert len(data) == 200
    assert sum(o != "task" for o in origins) == 40
    assert set(origins) == {"task", *TURNS}
    for row in data:
        assert oracle.harmful(row["messages"][-1]["content"]) == (row["origin"] != "task")
