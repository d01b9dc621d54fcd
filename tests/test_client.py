"""The client against a server that fails in every way we could think of: each failure is a value with its reason."""

import gc
import itertools
import socket
import threading
import time
from email.utils import formatdate

import pytest
from faulty_server import faulty_server

from safeshape.client import Client, Reply, _retry_after


@pytest.fixture
def server():
    with faulty_server() as running:
        yield running


def client_of(server, **changes):
    return Client(server.url, **{"model": "tiny", "pause_s": 0.001, "timeout_s": 5.0, "retries": 3, **changes})


def ask(client, prompts, endpoint="completions", **options):
    return list(client.stream(endpoint, ((p, {"prompt": p, "max_tokens": 1}) for p in prompts), **options))


def one(server, **changes):
    with client_of(server, **changes) as client:
        ((_, reply),) = ask(client, ["a"])
        return reply, client.counters


def test_replies_come_in_order_and_at_most_so_many_at_once(server):
    together = threading.Barrier(4)

    def wait(body):
        together.wait(30)  # breaks if fewer than four are ever on their way
        return 0.05 if body["prompt"] == "0" else 0.02

    server.delay_s = wait
    with client_of(server, concurrency=4, timeout_s=60.0) as client:
        got = ask(client, map(str, range(40)))
        assert [reply.data["choices"][0]["text"] for _, reply in got] == [str(n) for n in range(40)]
        assert [tag for tag, _ in got] == [str(n) for n in range(40)]
        counters = client.counters
    assert server.most == 4
    assert (counters.requests, counters.retries, counters.failures) == (40, 0, 0)
    assert (counters.prompt_tokens, counters.completion_tokens) == (120, 40)


def test_reading_ahead_is_bounded(server):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield number, {"prompt": "a"}

    with client_of(server) as client:
        stream = client.stream("completions", endless(), ahead=5)
        for _ in range(10):
            next(stream)
        assert len(read) == 14  # nine taken, five ahead, of which the tenth is being taken
        stream.close()


def test_a_tag_without_a_request_passes_through_in_its_place(server):
    with client_of(server) as client:
        got = list(client.stream("completions", [("a", {"prompt": "x"}), ("b", None), ("c", {"prompt": "y"})]))
    assert [(tag, reply is None) for tag, reply in got] == [("a", False), ("b", True), ("c", False)]
    assert len(server.bodies) == 2


def test_chat_goes_to_its_own_endpoint(server):
    with client_of(server) as client:
        ((_, reply),) = client.stream("chat", [(0, {"messages": [{"role": "user", "content": "hello"}]})])
    assert reply.data is not None
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies == [{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}]


PASSING = ["500", "502", "503", "529", "408", "409", "429", "cut", "short", "drop", "html", "list", "trickle:0.02"]


@pytest.mark.parametrize("fault", PASSING)
def test_what_can_pass_is_tried_again(server, fault):
    server.faults.extend([fault] * 2)
    reply, counters = one(server, timeout_s=1.0 if "trickle" in fault else 5.0)
    assert reply.data["choices"][0]["text"] == "a"
    assert reply.error is None
    assert (counters.requests, counters.retries, counters.failures) == (1, 2, 0)
    assert len(server.bodies) == 3


REASONS = {
    "500": "HTTP 500: injected 500, key sk-secret (tried 3 times)",
    "cut": "the answer is not valid JSON",
    "list": "the answer is not a JSON object (tried 3 times)",
    "drop": "connection failed: ",
    "hang:1.0": "no whole answer within 0.2 s (tried 3 times)",
    "trickle:0.01": "no whole answer within 0.2 s (tried 3 times)",
}


@pytest.mark.parametrize("fault", REASONS)
def test_what_stays_broken_is_a_value_with_its_reason(server, fault):
    server.default_fault = fault
    reply, counters = one(server, retries=2, timeout_s=0.2 if ":" in fault else 20.0)
    assert reply.data is None
    assert REASONS[fault] in reply.error
    assert (counters.requests, counters.retries, counters.failures) == (1, 2, 1)
    assert counters.prompt_tokens == 0


@pytest.mark.parametrize("code", [400, 403, 413, 422])
def test_a_refused_request_is_not_sent_again(server, code):
    server.faults.append(str(code))
    with client_of(server) as client:
        (_, first), (_, second) = ask(client, ["a", "b"], ahead=1)
    assert first == Reply(error=f"HTTP {code}: injected {code}, key sk-secret")
    assert second.data is not None
    assert len(server.bodies) == 2


def test_the_server_says_when_to_come_back(server):
    server.faults.append("429:0.3")
    start = time.monotonic()
    reply, _ = one(server)
    assert reply.data is not None
    assert time.monotonic() - start >= 0.3
    assert _retry_after("7") == 7
    assert 55 < _retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert [_retry_after(value) for value in (None, "", "soon", "-3", "nan")] == [0, 0, 0, 0, 0]


def test_pauses_double_jitter_and_have_an_end(server):
    with client_of(server, pause_s=0.5) as client, client_of(server, pause_s=0.5, seed=1) as other:
        pauses = [client._pause(tried, 0.0) for tried in range(20)]
        assert all(0.25 * 2**tried <= pauses[tried] <= 0.5 * 2**tried for tried in range(7))
        assert max(pauses) == 120
        assert client._pause(0, 9.0) == 9.0
        assert pauses != [other._pause(tried, 0.0) for tried in range(20)]


def test_a_failure_among_many_loses_nothing(server):
    server.faults.extend(["400", "", "500", "cut", "400"])
    with client_of(server, concurrency=2) as client:
        got = ask(client, map(str, range(12)))
    assert [tag for tag, _ in got] == [str(n) for n in range(12)]
    assert sum(reply.data is None for _, reply in got) == 2
    assert all((reply.data is None) != (reply.error is None) for _, reply in got)


def test_the_key_comes_from_the_environment_and_stays_out_of_errors(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    assert one(server, key_variable="MY_KEY")[0].data is not None
    assert server.keys == ["Bearer sk-secret"]
    server.faults.append("401")
    with pytest.raises(
        ValueError, match=r"refuses the key \(HTTP 401\); set the environment variable MY_KEY"
    ) as caught:
        one(server, key_variable="MY_KEY")
    assert "sk-secret" not in str(caught.value)
    with pytest.raises(ValueError, match="must not carry a password"):
        Client("http://me:sk-secret@localhost:1", model="tiny")


def test_the_check_at_the_start(server):
    with client_of(server) as client:
        assert client.check() == {"id": "tiny"}
    server.models = ["other", "another"]
    with client_of(server) as client, pytest.raises(ValueError, match="serves other, another, not 'tiny'"):
        client.check()
    for status in (404, 405):  # keeps no list
        server.models = status
        with client_of(server) as client:
            assert client.check() == {}
    for status, message in ((401, "refuses the key"), (403, "does not answer: HTTP 403"), (500, "HTTP 500")):
        server.models = status
        with client_of(server, retries=1) as client, pytest.raises(ValueError, match=message):
            client.check()


def test_no_server_at_the_start():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}", model="tiny", retries=1, pause_s=0.001) as client,
        pytest.raises(
            ValueError, match=rf"the server at http://127.0.0.1:{port}/v1 does not answer: connection failed"
        ),
    ):
        client.check()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("other-model", "answers for another model: 'other', not 'tiny'"), ("404", "has no such model or path: HTTP 404")],
)
def test_a_server_that_can_never_answer_stops_the_run(server, fault, message):
    server.faults.extend(["", fault])
    with client_of(server, concurrency=1) as client, pytest.raises(ValueError, match=message):
        ask(client, map(str, range(50)))
    assert len(server.bodies) <= 3


def test_an_error_that_nobody_waits_for_is_not_printed(server, caplog):
    """asyncio prints it when it collects the task, in the middle of anything. Needs a race, hence the repetition."""
    server.default_fault = "other-model"
    for _ in range(15):
        with client_of(server) as client, pytest.raises(ValueError, match="answers for another model"):
            ask(client, map(str, range(100)))
        gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_dated_name_is_the_same_model(server):
    server.answer = lambda body: {"model": "tiny-2026-11-01", "choices": []}
    assert one(server)[0].data == {"model": "tiny-2026-11-01", "choices": []}


def test_a_server_that_has_gone_stops_the_run():
    with faulty_server() as server:
        client = client_of(server, retries=0)
        assert ask(client, ["a"])[0][1].data is not None
    with client, pytest.raises(ValueError, match="has gone: connection failed"):
        ask(client, ["b"] * 1000)
    assert client.counters.failures <= 20 + 4 * client.concurrency  # what was read ahead fails too


def test_a_lasting_fault_of_a_living_server_does_not(server):
    server.default_fault = "500"
    with client_of(server, retries=0) as client:
        assert all(reply.data is None for _, reply in ask(client, ["b"] * 60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "server must be an http:// or https:// address, got 'localhost:8000'"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"timeout_s": 0}, "timeout above 0"),
        ({"retries": -1}, "retries at least 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Client(**{"base_url": "http://localhost:1", "model": "tiny", **changes})
