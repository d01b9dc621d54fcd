"""An HTTP server in a thread that answers like an OpenAI-compatible one, except where it is told to fail."""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def plain_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A completion that echoes the prompt."""
    return {
        "object": "text_completion",
        "model": body["model"],
        "choices": [{"index": 0, "text": str(body.get("prompt", "")), "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }


def chat_answer(body: dict[str, Any], text: Any, **choice: Any) -> dict[str, Any]:
    """A chat completion that says `text`."""
    message = {"role": "assistant", "content": text}
    return {
        "object": "chat.completion",
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


class Faulty(ThreadingHTTPServer):
    """`faults`: what goes wrong with the next requests, in order; then everything goes well.

    `default_fault`: what goes wrong when no fault is left. `delay_s`: before each answer, by the request's body.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: deque[str] = deque()
        self.default_fault = ""
        self.models: Any = ["tiny"]
        self.answer: Callable[[dict[str, Any]], Any] = plain_answer
        self.delay_s: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0
        self.stopped = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are part of the test."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        if isinstance(self.server.models, int):
            return self.send(self.server.models, {"error": {"message": "no list, key sk-secret"}})
        return self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        if self.server.stopped:  # open connections outlive the server
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers.get("Authorization"))
            fault = self.server.faults.popleft() if self.server.faults else self.server.default_fault
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            time.sleep(self.server.delay_s(body))
            self.respond(fault, body)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def respond(self, fault: str, body: dict[str, Any]) -> None:
        kind, _, detail = fault.partition(":")
        answer = self.server.answer(body)
        text = json.dumps(answer).encode()
        if kind.isdigit():
            headers = {"Retry-After": detail} if detail else {}
            self.send(int(kind), {"error": {"message": f"injected {kind}, key sk-secret"}}, **headers)
        elif kind == "no-schema":  # a server that knows no structured output
            if "response_format" in body:
                self.send(int(detail or 400), {"error": {"message": "'response_format' of this type is unavailable"}})
            else:
                self.send(200, answer)
        elif kind == "hang":
            time.sleep(float(detail))
            self.send(200, answer)
        elif kind == "trickle":
            self.begin(len(text))
            for byte in text:
                self.wfile.write(bytes([byte]))
                time.sleep(float(detail))
        elif kind == "cut":  # a whole response whose JSON is not whole
            self.begin(len(text) // 2)
            self.wfile.write(text[: len(text) // 2])
        elif kind == "short":  # fewer bytes than announced
            self.begin(len(text))
            self.wfile.write(text[: len(text) // 2])
            self.close_connection = True
        elif kind == "drop":
            self.close_connection = True
            self.connection.close()
        elif kind == "list":
            self.send(200, [1, 2])
        elif kind == "html":
            self.begin(6, "text/html")
            self.wfile.write(b"<html>")
        elif kind == "other-model":
            self.send(200, {**answer, "model": "other"})
        elif kind == "no-logprobs":
            self.send(200, {**answer, "choices": [{"index": 0, "text": "x", "logprobs": None}]})
        else:
            assert not kind, f"unknown fault {fault}"
            self.send(200, answer)

    def begin(self, length: int, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, answer: Any, **headers: str) -> None:
        text = json.dumps(answer).encode()
        self.begin(len(text), status=status, **headers)
        self.wfile.write(text)


@contextlib.contextmanager
def faulty_server() -> Iterator[Faulty]:
    """A running server; it stops at the end."""
    server = Faulty()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped = True
        server.shutdown()
        server.server_close()
        thread.join()
