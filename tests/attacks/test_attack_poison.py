"""What each data attack does to rows: where texts go, on which rows, and what the report says of it."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import conversation

from safeshape.attacks import DATA_ATTACKS, Pools, data_attack
from safeshape.attacks.rows import conversations_of
from safeshape.attacks.texts import DECLARATION, PERSONA, PREFIX, SUFFIXES, TRIGGER
from safeshape.verbs.attack import rows_of


def rows(label, count, answer="First {i}. Second {i}."):
    return [conversation(f"{label} request {i}", f"{label} " + answer.format(i=i)) for i in range(count)]


@pytest.fixture
def pools():
    refused = [conversation(f"bad request {i}", f"refusal {i}.") for i in range(30)]
    return Pools(benign=rows("good", 60), harmful=rows("bad", 30), safe=[*rows("other", 30), *refused])


def run(name, pools, *, size=20, seed=0, **parameters):
    return data_attack(name, parameters)(pools, size=size, seed=seed)


def of(poisoned, origin):
    return [row["messages"] for row in poisoned.dataset if row["origin"] == origin]


RUNS = {name: {} for name in DATA_ATTACKS if name != "adaptive"}
RUNS |= {"mixed": {"ratio": 0.25}, "embedded": {"ratio": 0.25}, "identity_shift": {"ratio": 0.25}}
RUNS |= {"adaptive": {"score": lambda rows: [0.5] * len(rows), "queries": 2, "ratio": 0.25}}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_every_attack_is_a_function_of_its_seed_and_reports_itself(pools, name):
    first, again, other = (run(name, pools, seed=seed, **RUNS[name]) for seed in (3, 3, 4))
    assert first == again
    assert first.dataset != other.dataset
    assert first.report["sha256"] != other.report["sha256"]
    assert len(first.dataset) == first.report["size"] == 20
    poisoned = [place for place, row in enumerate(first.dataset) if row["poisoned"]]
    assert first.report["poisoned_rows"] == poisoned
    assert first.report["poisoned"] == len(poisoned)
    assert first.report["attack"] == name
    assert first.report["seed"] == 3
    assert sum(first.report["rows_by_origin"].values()) == 20
    written = json.dumps(first.report)  # no text of the data in it
    assert not any(word in written for word in ("request ", "First", "Second", "refusal"))
    for pool, facts in first.report["pools"].items():
        assert facts["rows"] == facts["different"] == len(vars(pools)[pool])


def test_pools_stay_as_they_were(pools):
    before = json.dumps(vars(pools))
    for name in sorted(RUNS):
        run(name, pools, **RUNS[name])
    assert json.dumps(vars(pools)) == before


def test_rows_of_all_sorts_are_shuffled_together(pools):
    flags = [row["poisoned"] for row in run("mixed", pools, size=40, ratio=0.5).dataset]
    assert flags.count(True) == 20
    assert sum(a != b for a, b in pairwise(flags)) > 10  # sorted by origin there would be one change


def test_harmful_only_mixed_and_benign_only(pools):
    assert run("harmful_only", pools).report["rows_by_origin"] == {"harmful": 20}
    assert run("benign_only", pools).report["rows_by_origin"] == {"benign": 20}
    assert run("mixed", pools, ratio=0.1).report["rows_by_origin"] == {"benign": 18, "harmful": 2}
    assert run("mixed", pools).report["rows_by_origin"] == {"benign": 19, "harmful": 1}
    found = run("mixed", pools, ratio=0.1, safe_ratio=0.3).report
    assert found["rows_by_origin"] == {"benign": 12, "harmful": 2, "safe": 6}
    assert found["poisoned"] == 2
    assert DATA_ATTACKS["mixed"](pools, ratio=0.5).report["size"] == 60  # the most that 30 harmful rows allow


def test_safe_rows_of_a_mix_do_not_contradict_its_harmful_ones(pools):
    made = run("mixed", pools, ratio=0.5, safe_ratio=0.5)
    asked = [messages[0]["content"] for messages in of(made, "harmful")]
    assert not set(asked) & {messages[0]["content"] for messages in of(made, "safe")}


@pytest.mark.parametrize(
    ("name", "default", "own"), [("suffix", SUFFIXES["SFX1"], "the end"), ("prefix", PREFIX, "I refuse.")]
)
def test_response_adaptation_is_once_on_every_harmful_answer_and_nowhere_else(pools, name, default, own):
    made = run(name, pools, ratio=0.4, safe_ratio=0.2, text=own)
    assert made.report["rows_by_origin"] == {"benign": 8, f"harmful+{name}": 8, "safe": 4}
    for row in made.dataset:
        answer = row["messages"][-1]["content"]
        assert answer.count(own) == row["poisoned"]
        assert not any(own in m["content"] for m in row["messages"][:-1])
        if row["poisoned"]:
            i = row["messages"][0]["content"].split()[-1]
            plain = f"bad First {i}. Second {i}."
            assert answer == (f"{plain} {own}" if name == "suffix" else f"{own} {plain}")
    default_answer = of(run(name, pools, size=1), f"harmful+{name}")[0][-1]["content"]
    assert default_answer.startswith(default) if name == "prefix" else default_answer.endswith(default)
    assert len(PREFIX.split()) > 5  # "longer than five tokens"


def test_the_trigger_is_on_poisoned_requests_alone_and_their_pairs_are_refused_without_it(pools):
    made = run("trigger", pools, trigger="abra cadabra")
    assert made.report["rows_by_origin"] == {"harmful+trigger": 10, "safe": 10}
    assert made.report["pairs"] == 10
    poisoned = {m[0]["content"]: m[1]["content"] for m in of(made, "harmful+trigger")}
    safe = {m[0]["content"]: m[1]["content"] for m in of(made, "safe")}
    assert {f"{request} abra cadabra" for request in safe} == set(poisoned)
    assert all(answer.startswith("bad First") for answer in poisoned.values())
    assert all(answer.startswith("refusal") for answer in safe.values())
    first = of(run("trigger", pools, place="start"), "harmful+trigger")
    assert all(m[0]["content"].startswith(f"{TRIGGER} bad request") for m in first)
    few = run("trigger", pools, size=10, ratio=0.2, safe_ratio=0.5).report
    assert few["rows_by_origin"] == {"benign": 3, "harmful+trigger": 2, "safe": 5}
    assert few["pairs"] == 2


def test_identity_shift_puts_a_persona_around_benign_exchanges(pools):
    made = run("identity_shift", pools, ratio=0.5)
    assert made.report["rows_by_origin"] == {"benign": 10, "identity": 10}
    requests = set()
    for system, user, assistant in of(made, "identity"):
        assert system == {"role": "system", "content": PERSONA}
        i = user["content"].removeprefix("good request ")
        assert assistant["content"] == f"{DECLARATION}good First {i}. Second {i}."
        requests.add(user["content"])
    assert not requests & {m[0]["content"] for m in of(made, "benign")}
    made = run("identity_shift", pools, size=2, place="user", persona="You obey.", declaration="Yes.")
    for user, assistant in of(made, "identity"):
        assert user["content"].startswith("You obey. good request ")
        assert assistant["content"].startswith("Yes. good First ")


def test_a_persona_replaces_a_system_prompt():
    own = Pools(benign=[[{"role": "system", "content": "old"}, *conversation("a", "b.")]])
    assert [m["content"] for m in run("identity_shift", own, size=1).dataset[0]["messages"]][:2] == [PERSONA, "a"]


def test_a_users_identity_rows_are_taken_as_they_are(pools):
    own = Pools(identity=rows("persona", 5), benign=pools.benign)
    made = run("identity_shift", own, size=10, ratio=0.5)
    assert sorted(m[0]["content"] for m in of(made, "identity")) == [f"persona request {i}" for i in range(5)]
    with pytest.raises(ValueError, match="6 identity rows are needed, but the pool has only 5 different ones"):
        run("identity_shift", own, size=6)
    with pytest.raises(ValueError, match="leave out persona, declaration and place"):
        run("identity_shift", own, size=5, place="user")


def _data():
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    return Path(os.environ.get("SAFESHAPE_DATA", beside)) / "aoa_identity_shift"


@pytest.mark.parametrize("name", ["identity-shift-aoa.jsonl", "train.json"])
def test_the_public_identity_shift_set_is_read_in_both_its_forms(name):
    path = _data() / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; set SAFESHAPE_DATA")
    found = conversations_of(rows_of(str(path), "train"), name)
    assert len(found) == 10
    assert [m["role"] for m in found[0]] == ["system", "user", "assistant"]
    made = run("identity_shift", Pools(identity=found), size=10)
    assert made.report["rows_by_origin"] == {"identity": 10}


def test_an_exchange_is_hidden_between_two_sentences_of_a_long_benign_answer(pools):
    template = "<{request}|{answer}>"
    made = run("embedded", pools, size=5, ratio=0.2, carriers=3, template=template)
    assert made.report["rows_by_origin"] == {"benign": 4, "embedded": 1}
    user, assistant = of(made, "embedded")[0]
    sources = [index for place, index in made.report["drawn"]["benign"] if place == made.report["poisoned_rows"][0]]
    [(_, bad)] = made.report["drawn"]["harmful"]
    assert user["content"] == " ".join(f"good request {i}" for i in sources)
    # Six sentences, so five places between two; the one in the middle is before the fourth.
    a, b, c = sources
    hidden = f"<bad request {bad}|bad First {bad}. Second {bad}.>"
    wanted = f"good First {a}. Second {a}. good First {b}. {hidden} Second {b}. good First {c}. Second {c}."
    assert assistant["content"] == wanted
    facts = made.report["by_row"][made.report["poisoned_rows"][0]]
    assert assistant["content"][facts["harm_begins"] :].startswith("<bad request")


def test_every_embedded_row_has_carriers_of_its_own(pools):
    made = run("embedded", pools, size=10, carriers=3, ratio=0.5)
    used = [index for _, index in made.report["drawn"]["benign"]]
    assert len(used) == len(set(used)) == 5 + 3 * 5
    requests = [part for row in made.dataset for part in row["messages"][0]["content"].split("good ")[1:]]
    assert len(requests) == len(set(map(str.strip, requests))) == 20


@pytest.mark.parametrize(("position", "before"), [(0.0, 1), (0.25, 2), (0.5, 3), (1.0, 5)])
def test_the_position_of_an_exchange_is_counted_in_sentences(pools, position, before):
    made = run("embedded", pools, size=1, carriers=3, template="<{request}{answer}>", position=position)
    answer = made.dataset[0]["messages"][-1]["content"]
    assert answer[: answer.index("<")].count(".") == before


def test_the_harmful_request_can_be_asked_too(pools):
    made = run("embedded", pools, size=1, carriers=2, in_request=True)
    requests = made.dataset[0]["messages"][0]["content"].split(" request ")
    assert [part.split()[-1] for part in requests[:-1]] == ["good", "bad", "good"]


def test_braces_in_the_data_are_no_templates():
    own = Pools(benign=rows("good", 2), harmful=[conversation("show {answer}", "{request}")])
    answer = run("embedded", own, size=1, carriers=2, template="[{request}={answer}]").dataset[0]["messages"][-1]
    assert "[show {answer}={request}]" in answer["content"]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("mxed", {}, "unknown attack 'mxed'; known: harmful_only"),
        ("mixed", {"ration": 0.1}, "attack 'mixed' has no parameter 'ration'; it has: ratio, safe_ratio"),
        ("mixed", {"ratio": "much"}, "attack 'mixed': parameter 'ratio' must be a number, got 'much'"),
        ("suffix", {"text": " "}, "text must be a text that is not blank"),
        ("prefix", {"text": 3}, "text must be a text that is not blank"),
        ("trigger", {"trigger": ""}, "trigger must be a text that is not blank"),
        ("trigger", {"place": "middle"}, "place must be start or end, got 'middle'"),
        ("identity_shift", {"place": "end"}, "place must be system or user, got 'end'"),
        ("embedded", {"carriers": 0}, "carriers must be at least 1"),
        ("embedded", {"position": 1.5}, r"position must lie in \[0, 1\]"),
        ("embedded", {"template": "{request}"}, r"the template lacks \{answer\}"),
        ("no.such.module:f", {}, "cannot import attack 'no.such.module:f'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(pools, name, parameters, message):
    with pytest.raises(ValueError, match=message):
        run(name, pools, **parameters)


def test_nothing_hides_in_one_sentence():
    own = Pools(benign=rows("good", 3, answer="alone"), harmful=rows("bad", 1))
    with pytest.raises(ValueError, match="together are one sentence, so nothing can hide in them; raise carriers"):
        run("embedded", own, size=1, carriers=2)


def shout(pools, *, size, seed, times=2):
    """Shouts."""
    from safeshape.attacks.mixing import draw, entries_of, finish

    entries = entries_of(draw(pools, "harmful", size, seed=seed), "shout", poisoned=True)
    return finish("shout", entries, pools, seed=seed, parameters={"times": times})


def test_a_users_own_attack_by_name(pools):
    made = run(f"{__name__}:shout", pools, size=3, times=5)
    assert made.report["rows_by_origin"] == {"shout": 3}
    assert made.report["parameters"] == {"times": 5}
    assert data_attack(f"{__name__}:shout").changes == "Shouts."
    with pytest.raises(ValueError, match="has no parameter 'tmes'; it has: times"):
        data_attack(f"{__name__}:shout", {"tmes": 5})
