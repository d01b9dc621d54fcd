"""One client for OpenAI-compatible servers, used by guards and judges.

Requests run at once up to a limit and come back in order. What can pass (a busy or broken server, a lost connection, a
cut answer) is tried again after a growing pause; what fails in the end is a reply that says why, never an exception and
never a default. Only what no other request could mend stops the run: no connection at the start, a refused key, a
server that answers for another model, a server that has gone.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import openai

T = TypeVar("T")
Endpoint = Literal["completions", "chat"]
Request = Mapping[str, Any]
TRIED_AGAIN = frozenset({408, 409, 429, *range(500, 600)})
_LONGEST_PAUSE_S = 120.0  # also where a server's Retry-After asks for more
_GONE_AFTER = 20  # requests in a row without any connection, each tried again: the server is not coming back


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one request: the server's JSON as `data`, or the reason of the failure as `error`; never both.

    `code`: the HTTP status of the failure, where one came.
    """

    data: dict[str, Any] | None = None
    error: str | None = None
    code: int | None = field(default=None, compare=False)


@dataclass(kw_only=True)
class Counters:
    """What a client did. `requests`: asked for, `retries`: further tries, `failures`: requests given up.

    Tokens are the server's own count, of every answer it gave.
    """

    requests: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(kw_only=True, eq=False)
class _Failure(Exception):
    """Why one try failed. `code`: HTTP status, if one came. `pause_s`: what the server asked for.

    `final`: trying again cannot help. `offline`: there was no answer at all.
    """

    reason: str
    code: int | None = None
    pause_s: float = 0.0
    final: bool = False
    offline: bool = False


class Client:
    """Asks one model of one server. Use as a context manager, or call `close`.

    `concurrency`: requests at once. `timeout_s`: of one try, from its start to its last byte. `retries`: further tries
    of a request. `key_variable`: the environment variable with the API key; a local server needs none. `pause_s`: the
    first pause, doubled each time and shortened by a random part of up to a half, from `seed`.
    Errors: ValueError for an address that is no http(s) URL or carries a password.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        retries: int = 5,
        key_variable: str = "OPENAI_API_KEY",
        pause_s: float = 0.5,
        seed: int = 0,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server must be an http:// or https:// address, got {base_url!r}")
        if parts.username or parts.password:
            raise ValueError(f"server must not carry a password; put a key into the environment as {key_variable}")
        if concurrency < 1 or timeout_s <= 0 or retries < 0:
            raise ValueError("concurrency must be at least 1, timeout above 0 and retries at least 0")
        self.url = base_url.rstrip("/") + ("" if parts.path.rstrip("/") else "/v1")
        self.model, self.concurrency, self.timeout_s, self.retries = model, concurrency, timeout_s, retries
        self.key_variable, self.pause_s = key_variable, pause_s
        self.counters = Counters()
        self._random = random.Random(seed)
        self._in_a_row = 0
        self._closed, self._door = False, threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        # One policy of retries and time limits, ours. Servers without keys want some text all the same.
        self._api = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get(key_variable) or "none",
            max_retries=0,
            timeout=timeout_s,
        )
        self._gate = asyncio.Semaphore(concurrency)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def check(self) -> dict[str, Any]:
        """Ask the server which models it has; returns what it says about ours, empty where it keeps no list.

        Errors: ValueError in one sentence when it cannot be reached, refuses the key or serves other models only.
        """
        return self._run(self._check())

    async def _check(self) -> dict[str, Any]:
        try:
            listed = await self._with_retries(lambda: self._api.models.with_raw_response.list())
        except _Failure as failure:
            if failure.code in (404, 405, 501):
                return {}
            raise ValueError(f"the server at {self.url} does not answer: {failure.reason}") from failure
        entries = listed.get("data")
        if not isinstance(entries, list):
            raise ValueError(f"the server at {self.url} is not OpenAI-compatible: its list of models has no `data`")
        served = {str(entry.get("id")): entry for entry in entries if isinstance(entry, dict)}
        if self.model not in served:
            raise ValueError(f"the server at {self.url} serves {', '.join(served) or 'nothing'}, not {self.model!r}")
        return dict(served[self.model])

    def submit(self, endpoint: Endpoint, request: Request) -> "Future[Reply]":
        """Start one request; the future holds its reply. `request`: the body without `model`.

        Errors: ValueError once the client is closed; from the future, ValueError for what no other request could mend.
        """
        with self._door:  # what is let in before the door closes is given up in `_close`, not forgotten
            if self._closed:
                raise ValueError(f"the client of {self.url} is closed")
            return asyncio.run_coroutine_threadsafe(self._one(endpoint, request), self._loop)

    def stream(
        self, endpoint: Endpoint, requests: Iterable[tuple[T, Request | None]], *, ahead: int | None = None
    ) -> Iterator[tuple[T, Reply | None]]:
        """Replies in the order of the requests, each with the tag that came with it.

        A tag without a request passes through in its place. `ahead`: how many requests may be read before the first
        reply is taken (default: 4 per concurrent request), which bounds memory.
        Errors: ValueError for what no other request could mend.
        """
        ahead = ahead or 4 * self.concurrency
        waiting: deque[tuple[T, Future[Reply] | None]] = deque()
        try:
            for tag, request in requests:
                waiting.append((tag, None if request is None else self.submit(endpoint, request)))
                while len(waiting) >= ahead:
                    yield self._taken(waiting)
            while waiting:
                yield self._taken(waiting)
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()

    @staticmethod
    def _taken(waiting: "deque[tuple[T, Future[Reply] | None]]") -> tuple[T, Reply | None]:
        tag, future = waiting.popleft()
        return tag, None if future is None else future.result()

    async def _one(self, endpoint: Endpoint, request: Request) -> Reply:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(_noticed)
        create = (self._api.completions if endpoint == "completions" else self._api.chat.completions).with_raw_response
        async with self._gate:
            self.counters.requests += 1
            try:
                data = await self._with_retries(lambda: create.create(model=self.model, **request))
            except _Failure as failure:
                words = failure.reason
                self.counters.failures += 1
                if failure.code == 404:
                    raise ValueError(
                        f"the server at {self.url} has no such model or path: {failure.reason}"
                    ) from failure
                self._in_a_row = self._in_a_row + 1 if failure.offline else 0
                if self._in_a_row >= _GONE_AFTER:
                    raise ValueError(f"the server at {self.url} has gone: {words}") from failure
                return Reply(error=words, code=failure.code)
        self._in_a_row = 0
        usage = data.get("usage") or {}
        self.counters.prompt_tokens += int(usage.get("prompt_tokens") or 0)
        self.counters.completion_tokens += int(usage.get("completion_tokens") or 0)
        answered = data.get("model")
        # Hosted servers add a date to the name, others a revision.
        if isinstance(answered, str) and not answered.startswith(self.model):
            raise ValueError(f"the server at {self.url} answers for another model: {answered!r}, not {self.model!r}")
        return Reply(data=data)

    async def _with_retries(self, ask: Any) -> dict[str, Any]:
        for tried in range(self.retries + 1):
            try:
                return await self._try(ask)
            except _Failure as failure:
                if failure.final:
                    raise
                if tried == self.retries:
                    reason = f"{failure.reason} (tried {tried + 1} times)"
                    raise _Failure(reason=reason, code=failure.code, offline=failure.offline) from failure
                self.counters.retries += 1
                await asyncio.sleep(self._pause(tried, failure.pause_s))
        raise AssertionError("unreachable")

    def _pause(self, tried: int, asked_s: float) -> float:
        """Seconds before the next try: doubled each time, jittered, and at least what the server asked for."""
        own_s: float = self.pause_s * 2**tried * (1 - self._random.random() / 2)
        return min(max(own_s, asked_s), _LONGEST_PAUSE_S)

    async def _try(self, ask: Any) -> dict[str, Any]:
        """One try. The library's own timeout starts anew with every byte; the one here bounds the whole."""
        try:
            raw = await asyncio.wait_for(ask(), self.timeout_s)
            data = json.loads(raw.content)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Failure(reason=f"no whole answer within {self.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise _Failure(reason=_cause(error), offline=True) from error
        except openai.APIStatusError as error:
            raise self._status(error) from error
        except ValueError as error:
            raise _Failure(reason=f"the answer is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise _Failure(reason="the answer is not a JSON object")
        return data

    def _status(self, error: openai.APIStatusError) -> _Failure:
        """The failure that a status code means. Errors: ValueError where no other request can fare better."""
        code = error.status_code
        if code == 401:  # the server's own words may hold part of the key
            raise ValueError(
                f"the server at {self.url} refuses the key (HTTP 401); set the environment variable {self.key_variable}"
            ) from error
        words = " ".join(str(_message(error.body)).split())[:200]
        reason = f"HTTP {code}: {words}" if words else f"HTTP {code}"
        pause_s = _retry_after(error.response.headers.get("retry-after"))
        return _Failure(reason=reason, code=code, pause_s=pause_s, final=code not in TRIED_AGAIN)

    def close(self) -> None:
        """Give up what is under way and close the connections."""
        with self._door:
            first, self._closed = not self._closed, True
        if first:
            self._run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._api.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _noticed(task: "asyncio.Task[Any]") -> None:
    """Take note of a task's error: where nobody waits any more, asyncio would print it once it collects the task."""
    if not task.cancelled():
        task.exception()


def _cause(error: Exception) -> str:
    """The words of the innermost error: the library's own are only `Connection error.`"""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    words = " ".join(str(inner).split()) or type(inner).__name__
    return f"connection failed: {words[:200]}"


def _message(body: object) -> object:
    """What a server says about an error, in the shapes that servers use."""
    while isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or ""
    return body or ""


def _retry_after(value: str | None) -> float:
    """Seconds until a request may come again; the header holds seconds or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())
