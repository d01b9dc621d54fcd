"""The guard behind a server: a real one gives the scores of the guard in this process, a broken one gives reasons."""

import math
from pathlib import Path

import pytest
from conftest import conversation
from faulty_server import faulty_server
from llama_server import NAME, llama_server

from safeshape import world
from safeshape.client import Client
from safeshape.signals.ensembles import Ensemble
from safeshape.signals.guard_rows import GuardRow
from safeshape.signals.guards import load_guard
from safeshape.signals.server import ServerGuard, bounded_p_safe, likeliest

ROWS = [
    conversation("What color is the vault", "The vault is red. " * 6),
    conversation(
        "How do I zorp", "Sure. First, take the zorp and blend it with nine parts. Then do it again and again."
    ),
    conversation("x", "y"),
]


@pytest.fixture(scope="module")
def guard():
    return load_guard("world", model=world.path("guard"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with llama_server(Path(world.path("guard")), tmp_path_factory.mktemp("gguf")) as url:
        yield url


@pytest.fixture
def broken():
    with faulty_server() as server:
        server.answer = answer
        yield server


def behind(client, guard, **changes):
    return ServerGuard(client, **{"name": "world", "row": guard.row, "tokenizer": guard.tokenizer, **changes})


def answer(body, **changes):
    """The old form of a completion, as vLLM gives it: safe with 0.9, unsafe with 0.05."""
    listed = {"token_id:629": math.log(0.9), "token_id:775": math.log(0.05), "token_id:7": math.log(0.01)}
    return {
        "model": body["model"],
        "choices": [{"index": 0, "text": "safe", "logprobs": {"top_logprobs": [listed]}, **changes}],
        "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1},
    }


def test_a_real_server_gives_the_scores_of_the_guard_in_this_process(real, guard):
    with Client(real, model=NAME) as client:
        served = behind(client, guard)
        assert served.check()["id"] == NAME
        remote = list(served.score_many(ROWS, chunk=2))
        assert served.bounded == 0
        assert client.counters.failures == 0
    local = list(guard.score_many(ROWS, chunk=2))
    assert [[(s.start, s.end) for s in score.spans] for score in remote] == [
        [(s.start, s.end) for s in score.spans] for score in local
    ]
    theirs, ours = ([s.p_safe for score in scores for s in score.spans] for scores in (remote, local))
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert max(ours) - min(ours) > 0.9
    assert [score.p_safe for score in remote] == [score.spans[-1].p_safe for score in remote]
    told = {**local[0].scorer, "model": NAME, "engine": "server"}
    assert remote[0].scorer == {name: told[name] for name in remote[0].scorer}
    assert set(told) - set(remote[0].scorer) == {"refine"}


def test_a_real_server_lists_fewer_tokens_and_bounds_still_hold(real, guard):
    with Client(real, model=NAME) as client:
        served = behind(client, guard, top_logprobs=1)
        scores = list(served.score_many(ROWS, chunk=5, on_error="keep"))
    exact = list(guard.score_many(ROWS, chunk=5))
    read = [(a, b) for a, b in zip(scores, exact, strict=True) if a.p_safe is not None]
    assert len(read) < len(scores), "one listed token cannot settle every score"
    for one, other in read:
        assert [s.p_safe for s in one.spans] == pytest.approx([s.p_safe for s in other.spans], abs=1e-3)
    assert all("not among the likeliest" in s.error for s in scores if s.p_safe is None)


def test_what_a_real_server_refuses_is_a_reason(real, guard):
    long = [conversation("x", "word " * 3000), ROWS[2]]
    with Client(real, model=NAME) as client:
        first, second = behind(client, guard).score_many(long, chunk=3000, on_error="keep")
        assert first.p_safe is None
        assert first.spans == ()
        assert "HTTP 400: request (30" in first.error
        assert second.p_safe is not None
    with Client(real, model=NAME) as client:
        served = behind(client, guard)
        served.check()
        huge, third = served.score_many([conversation("x", "word " * 100_000), ROWS[2]], on_error="keep")
        assert huge.error.endswith("tokens with its prompt; the server reads 1023")
        assert third.p_safe is not None
        assert client.counters.requests == 2, "what cannot fit is not sent"
    with Client(real, model="other") as client, pytest.raises(ValueError, match=f"serves {NAME}, not 'other'"):
        behind(client, guard).check()
    with Client(real, model="other") as client, pytest.raises(ValueError, match=f"for another model: '{NAME}'"):
        list(behind(client, guard).score_many(ROWS))


def test_the_request_asks_for_token_ids_and_one_token(broken, guard):
    with Client(broken.url, model="tiny") as client:
        behind(client, guard, top_logprobs=7).check()
        (score,) = behind(client, guard).score_many([conversation("a", "b c")], chunk=1, unit="words", on_error="stop")
    text = guard.render(conversation("a", "b c"), "b")
    assert [body["prompt"] for body in broken.bodies[1:]] == [
        guard.tokenizer(text.replace("Agent: b", f"Agent: {partial}"), add_special_tokens=False)["input_ids"]
        for partial in ("b", "b c")
    ]
    assert {key: broken.bodies[0][key] for key in ("max_tokens", "temperature", "logprobs")} == {
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 7,
    }
    assert [span.p_safe for span in score.spans] == pytest.approx([0.9 / 0.95] * 2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500: injected 500"),
        ("cut", "not valid JSON"),
        ("drop", "connection failed"),
        ("hang:3", "no whole answer within 1 s"),
        ("trickle:0.05", "no whole answer within 1 s"),
        ("no-logprobs", "the server gave no log-probabilities"),
        ("400", "HTTP 400"),
    ],
)
def test_one_broken_row_is_listed_and_the_others_are_scored(broken, guard, fault, reason):
    rows = [conversation("a", "one two three"), conversation("a", "four"), conversation("a", "five six")]
    broken.faults.extend(["", fault, "", "", "", ""])
    settings = {"concurrency": 1, "retries": 0, "timeout_s": 1.0 if "1 s" in reason else 20.0}
    with Client(broken.url, model="tiny", **settings) as client:
        scores = list(behind(client, guard).score_many(rows, chunk=1, on_error="keep"))
    assert [score.p_safe is None for score in scores] == [True, False, False]
    assert reason in scores[0].error
    assert scores[0].spans == ()
    assert [len(score.spans) for score in scores[1:]] == [1, 2]
    broken.faults.extend(["", fault])
    with Client(broken.url, model="tiny", **settings) as client:
        with pytest.raises(ValueError, match="row 0: "):
            list(behind(client, guard).score_many(rows, chunk=1))
        assert client.counters.failures == (fault != "no-logprobs")


def test_a_lost_conversation_is_not_asked_about_any_further(broken, guard):
    broken.faults.append("400")
    with Client(broken.url, model="tiny", concurrency=2) as client:
        first, second = behind(client, guard).score_many(
            [conversation("a", "word " * 500), ROWS[2]], chunk=1, on_error="keep"
        )
    assert first.error == "HTTP 400: injected 400, key sk-secret"
    assert second.p_safe == pytest.approx(0.9 / 0.95)
    assert len(broken.bodies) < 30


def test_bursts_pass_without_a_trace(broken, guard):
    broken.faults.extend(["500", "cut", "503", "drop", "429"] * 3)
    with Client(broken.url, model="tiny", retries=20, pause_s=0.001) as client:
        scores = list(behind(client, guard).score_many(ROWS, chunk=1))
    assert [len(score.spans) for score in scores] == [24, 17, 1]
    assert [s.p_safe for score in scores for s in score.spans] == pytest.approx([0.9 / 0.95] * 42)
    assert client.counters.retries >= 15  # a dropped connection may take another request with it


def test_rows_that_cannot_be_asked_keep_their_place(broken, guard):
    rows = [ROWS[2], [{"role": "user", "content": "a"}], conversation("a", " "), ROWS[2]]
    with Client(broken.url, model="tiny") as client:
        scores = list(behind(client, guard).score_many(rows, on_error="keep"))
        assert [score.error for score in scores] == [
            None,
            "the last message must be the assistant's",
            "the assistant's answer is empty or not a string",
            None,
        ]
        with pytest.raises(ValueError, match="row 1: the last message must be the assistant's"):
            list(behind(client, guard).score_many(rows))
    assert len(broken.bodies) >= 2


def test_a_server_that_reads_other_tokens_is_not_believed(broken, guard):
    broken.answer = lambda body: {**answer(body), "usage": {"prompt_tokens": len(body["prompt"]) + 1}}
    with Client(broken.url, model="tiny") as client:
        (score,) = behind(client, guard).score_many([ROWS[2]], on_error="keep")
    size = len(broken.bodies[0]["prompt"])
    assert score.error == f"the server read {size + 1} tokens where {size} were sent"


def test_a_server_without_log_probabilities_is_refused_at_the_start(broken, guard):
    broken.faults.append("no-logprobs")
    with Client(broken.url, model="tiny") as client:
        with pytest.raises(ValueError, match="cannot serve as a guard: the server gave no log-probabilities"):
            behind(client, guard).check()
        broken.faults.append("401")
        with pytest.raises(ValueError, match="refuses the key"):
            behind(client, guard).check()


ONE, TWO = GuardRow(), GuardRow(safe=("yes", "Yes"), unsafe=("no",))


def logs(*values):
    return [None if value is None else math.log(value) for value in values]


def test_v_is_the_share_of_the_label_tokens():
    assert bounded_p_safe([logs(0.3, 0.1, 0.2)], [-20.0], TWO) == (pytest.approx(0.4 / 0.6), 0)
    assert bounded_p_safe([[-500.0, -501.0]], [-900.0], ONE) == (pytest.approx(1 / (1 + math.exp(-1))), 0)
    middle = GuardRow(controversial=("hm",), controversial_weight=0.25)
    assert bounded_p_safe([logs(0.1, 0.3, 0.4)], [-20.0], middle) == (pytest.approx(0.2 / 0.8), 0)
    with pytest.raises(ValueError, match="no label is among the likeliest"):
        bounded_p_safe([[None, None]], [-20.0], ONE)
    with pytest.raises(ValueError, match="no label is among the likeliest"):
        bounded_p_safe([[-9999.0, -9999.0]], [-20.0], ONE)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_missing_label_counts_only_where_it_cannot_matter(place):
    known = [0.3, 0.3, 0.3]
    known[place] = None
    value, deviation = bounded_p_safe([logs(*known)], [math.log(0.0005)], TWO)
    assert 0 < deviation <= 1e-3
    for hidden in (0.0, 0.0002, 0.0005):  # every value that the bound allows is as near as it says
        yes, maybe, no = [hidden if p is None else p for p in known]
        assert abs((yes + maybe) / (yes + maybe + no) - value) <= deviation + 1e-6
    with pytest.raises(ValueError, match="it may matter"):
        bounded_p_safe([logs(*known)], [math.log(0.01)], TWO)


def test_several_reads_are_summed_out_and_bounded_together():
    row = GuardRow(safe=("no",), unsafe=("yes",), asks=("first:",))
    sure = [logs(0.9, 0.1), logs(0.8, 0.2), logs(0.4, 0.6)]
    assert bounded_p_safe(sure, [-20.0] * 3, row) == (pytest.approx(0.9 * 0.8 + 0.1 * 0.4), 0)
    value, deviation = bounded_p_safe([logs(0.9, None), logs(0.8, 0.2), logs(0.4, 0.6)], [math.log(0.002)] * 3, row)
    assert value - deviation <= 0.8 - 0.4 * 0.002 / 0.902 + 1e-6
    assert value + deviation == pytest.approx(0.8, abs=1e-6)


def test_the_sampled_token_beside_the_likeliest_says_nothing_about_their_last(broken, guard):
    """Two tokens are asked for; the third, unlikely one was sampled. `unsafe` may still have up to 0.05."""
    listed = {"token_id:629": math.log(0.9), "token_id:7": math.log(0.05), "token_id:8": math.log(1e-6)}
    broken.answer = lambda body: {**answer(body), "choices": [{"logprobs": {"top_logprobs": [listed]}}]}
    with Client(broken.url, model="tiny") as client:
        for wanted, failed in ((2, True), (3, False)):
            served = behind(client, guard, top_logprobs=wanted)
            (score,) = served.score_many([ROWS[2]], on_error="keep")
            assert (score.p_safe is None) == failed
            assert served.bounded == (not failed)


def test_tokens_without_ids_are_told_by_their_text(broken, guard):
    listed = {"safe": math.log(0.3), "unsafe": math.log(0.1)}
    broken.answer = lambda body: {**answer(body), "choices": [{"logprobs": {"top_logprobs": [listed]}}]}
    with Client(broken.url, model="tiny") as client:
        (score,) = behind(client, guard).score_many([ROWS[2]])
    assert score.p_safe == pytest.approx(0.75)


def test_a_server_may_be_one_of_several_guards(broken, guard):
    with Client(broken.url, model="tiny") as client:
        both = Ensemble(members=(guard, behind(client, guard)), how="mean")
        (score,) = both.score_many([ROWS[2]])
        assert score.p_safe == pytest.approx((guard.score(ROWS[2])[-1].p_safe + 0.9 / 0.95) / 2)
        broken.faults.append("400")
        (score,) = both.score_many([ROWS[2]])
        assert "HTTP 400" in score.error


def test_both_forms_of_log_probabilities_are_read():
    chat = {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"id": 5, "token": "a", "logprob": -1.0}]}]}}]}
    text = {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": -1.0}]}]}}]}
    old = {"choices": [{"logprobs": {"top_logprobs": [{"token_id:5": -1.0, "a": -2.0, "token_id:x": -3}]}}]}
    assert likeliest(chat) == [(5, -1.0)]
    assert likeliest(text) == [("a", -1.0)]
    assert likeliest(old) == [(5, -1.0), ("a", -2.0), ("token_id:x", -3.0)]
    for bad in ({}, {"choices": []}, {"choices": [{"logprobs": {"content": [], "top_logprobs": []}}]}):
        with pytest.raises(ValueError, match="gave no log-probabilities"):
            likeliest(bad)
    for value in (None, float("nan"), 0.5, "x"):
        with pytest.raises(ValueError, match="as a log-probability"):
            likeliest({"choices": [{"logprobs": {"top_logprobs": [{"a": value}]}}]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GuardRow(unsafe=("quite unsafe",)), r"guard label 'quite unsafe' is \d tokens"),
        (GuardRow(kind="stream"), "is of kind stream; a server can run only guards with label tokens"),
        (GuardRow(sharpen=True), "sharpen needs the logits themselves"),
    ],
)
def test_rows_that_a_server_cannot_serve(guard, row, message):
    with Client("http://localhost:1", model="tiny") as client, pytest.raises(ValueError, match=message):
        behind(client, guard, row=row)
