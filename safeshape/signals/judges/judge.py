"""The judge: asks a model for verdicts, reads them strictly, keeps them in a store and asks nothing twice."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from safeshape.client import Client
from safeshape.data import Message
from safeshape.signals.judges.asking import Answer, Asking, Question
from safeshape.signals.judges.in_process import InProcess
from safeshape.signals.judges.judging import in_order, judgement_score
from safeshape.signals.judges.remote import Remote
from safeshape.signals.rubric import Rubric, Unreadable, evidence, prompt, read_verdict, rubric_of
from safeshape.store import Store, content_key
from safeshape.types import Judgement, Score

DEFAULT_MODEL = "gpt-oss-20b"  # as served by vLLM: `vllm serve openai/gpt-oss-20b --served-model-name gpt-oss-20b`


@dataclass(kw_only=True)
class Counters:
    """`asked`: conversations that went to the model, `reused`: that the store knew, `joined`: that were under way.

    `unreadable`: answers without a verdict, `failed`: conversations that got none in the end.
    """

    asked: int = 0
    reused: int = 0
    joined: int = 0
    unreadable: int = 0
    failed: int = 0


@dataclass(kw_only=True, eq=False)
class _Case:
    """One conversation on its way, and everybody who waits for it."""

    key: str
    judged: list[dict[str, Any]]
    waiting: "list[Future[Judgement]]" = field(default_factory=list)
    answering: "Future[Answer] | None" = None


class Judge:
    """A model as judge, behind an OpenAI-compatible chat server or in this process. Use as a context manager.

    `endpoint_or_model`: an http(s) address, a folder or Hub id of a causal model, or anything that can be asked
    (`Asking`; it is the caller's to close). `model`: its name at the server. `rubric`: a shipped rubric, a text file,
    or a `Rubric`. `store`: a file that keeps verdicts (or a `Store`, whose file is opened once more); None keeps them
    for this run only. `tries`: how often a model is asked whose answers cannot be read; each further time it is told
    so, behind a server at another seed and temperature.
    `settings`: those of `Remote` and of `Client` (concurrency, timeout_s, retries, ...), or of `InProcess`.
    Errors: ValueError in one sentence.
    """

    def __init__(
        self,
        endpoint_or_model: str | Asking,
        *,
        model: str | None = None,
        rubric: str | Rubric = "standard",
        store: str | Path | Store | None = None,
        tries: int = 3,
        **settings: Any,
    ) -> None:
        if tries < 1:
            raise ValueError(f"tries must be at least 1, got {tries}")
        self.rubric, self.tries = rubric_of(rubric), tries
        self._owned = isinstance(endpoint_or_model, str)
        self.asking: Asking = (
            _opened(endpoint_or_model, model, settings) if isinstance(endpoint_or_model, str) else endpoint_or_model
        )
        self.done = Counters()
        self._maker: dict[str, Any] | None = None
        self._cases: dict[str, _Case] = {}
        self._failed: dict[str, str] = {}
        self._door, self._closed = threading.Lock(), False
        # One thread does all but the asking: SQLite wants one, and nothing needs a lock then.
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._path = store.path if isinstance(store, Store) else store
        try:
            self._store = self._keeper.submit(Store, self._path or ":memory:").result()
        except ValueError:
            self._keeper.shutdown()
            if self._owned:
                self.asking.close()
            raise

    def told(self, rubric: str | Rubric) -> "Judge":
        """The same model told another rubric. It lives no longer than this judge, and keeps verdicts where it does."""
        return Judge(self.asking, rubric=rubric, store=self._path, tries=self.tries)

    def identity(self) -> dict[str, Any]:
        """Who judges, and how: rubric, model and settings, as they stand in scored data."""
        rubric = {"name": self.rubric.name, "sha256": self.rubric.sha256}
        return {"judge": "model", "rubric": rubric, "tries": self.tries, **self.asking.identity()}

    def maker(self) -> dict[str, Any]:
        """The identity and what the model's own side tells of its weights: what the store's keys are made from.

        Errors: ValueError in one sentence when a server cannot be reached, refuses the key or has other models.
        """
        with self._door:
            if self._maker is None:
                self._maker = {**self.identity(), **self.asking.maker()}
            return self._maker

    def submit(self, messages: Sequence[Message]) -> "Future[Judgement]":
        """Start on one conversation and return at once, but for the first, which waits for the server's greeting.

        A conversation that is under way is not asked about twice; one that failed is not asked about again in this run.
        Cancelling the future gives the question up where nobody else waits for it.
        Errors: those of `maker`; ValueError once the judge is closed; those of `Asking.submit` from the future.
        """
        maker = self.maker()
        found: Future[Judgement] = Future()
        try:
            judged = evidence(messages)
            key = content_key(judged, maker)
        except ValueError as error:
            found.set_result(Judgement(score=None, error=str(error)))
            return found
        with self._door:
            if self._closed:
                raise ValueError("the judge is closed")
            self._keeper.submit(self._begin, _Case(key=key, judged=judged, waiting=[found]))
        found.add_done_callback(lambda done: self._post(self._given_up, key) if done.cancelled() else None)
        return found

    def score(self, messages: Sequence[Message]) -> Judgement:
        """The verdict on one conversation, whose last message is the judged answer."""
        return self.submit(messages).result()

    def judge_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Judgement]:
        """The verdicts in order; as many conversations are under way at once as keep the model busy."""
        return in_order(self.submit, conversations, ahead=self.asking.ahead)

    def score_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        """The verdicts as scores of the signal "judge", p_safe = 1 - (score - 1) / 4."""
        identity = self.identity()
        return (judgement_score(judgement, identity) for judgement in self.judge_many(conversations))

    def counters(self) -> dict[str, Any]:
        """What was asked, reused and failed, with the model's requests, tokens and cost."""
        return {**asdict(self.done), **self.asking.counters()}

    def close(self) -> None:
        """Give up what is under way; those who wait for it get a CancelledError. What was judged is kept."""
        with self._door:
            first, self._closed = not self._closed, True
        if first:
            if self._owned:
                self.asking.close()
            self._keeper.submit(self._abandon)
            self._keeper.shutdown()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _post(self, work: Callable[..., None], *arguments: Any) -> None:
        """Have the keeper's thread do something."""
        # Shut down after all who wait were told; what comes later has nobody to tell.
        with contextlib.suppress(RuntimeError):
            self._keeper.submit(work, *arguments)

    def _begin(self, case: _Case) -> None:
        try:
            running = self._cases.get(case.key)
            if running is not None:
                self.done.joined += 1
                running.waiting += case.waiting
            elif case.key in self._failed:
                self.done.joined += 1
                _resolve(case, Judgement(score=None, error=self._failed[case.key]))
            elif found := self._store.get_many("judgements", [case.key]):
                self.done.reused += 1
                kept = found[case.key]
                _resolve(case, Judgement(score=kept["score"], category=kept["category"]))
            else:
                self.done.asked += 1
                self._cases[case.key] = case
                self._ask(case, 0)
        except Exception as error:
            self._stop(case, error)

    def _ask(self, case: _Case, tried: int) -> None:
        told, shown = prompt(case.judged, self.rubric, again=tried > 0)
        case.answering = self.asking.submit(Question(told=told, shown=shown, tried=tried))
        case.answering.add_done_callback(lambda answered: self._post(self._take, case, tried, answered))

    def _take(self, case: _Case, tried: int, answered: "Future[Answer]") -> None:
        try:
            answer = answered.result()
            reason = answer.error
            if reason is None:
                try:
                    read = read_verdict(str(answer.text))
                    kept = {"score": read.score, "category": read.category, "tried": tried + 1}
                    self._store.put_many("judgements", {case.key: {**kept, **answer.notes}})
                    self._finish(case, read)
                    return
                except Unreadable as error:
                    reason = str(error)
            if answer.error is None or answer.again:
                self.done.unreadable += 1
                if tried + 1 < self.tries:
                    self._ask(case, tried + 1)
                    return
                reason = f"{reason} (asked {self.tries} times)"
            self._failed[case.key] = str(reason)
            self.done.failed += 1
            self._finish(case, Judgement(score=None, error=reason))
        except (Exception, CancelledError) as error:
            self._stop(case, error)

    def _given_up(self, key: str) -> None:
        case = self._cases.get(key)
        if case is not None and all(future.cancelled() for future in case.waiting):
            del self._cases[key]
            if case.answering is not None:
                case.answering.cancel()

    def _abandon(self) -> None:
        for case in list(self._cases.values()):
            if case.answering is not None:
                case.answering.cancel()
            self._stop(case, CancelledError())
        self._store.close()

    def _finish(self, case: _Case, judgement: Judgement) -> None:
        if self._cases.get(case.key) is case:  # not so where it was given up, and begun anew by another
            del self._cases[case.key]
        _resolve(case, judgement)

    def _stop(self, case: _Case, error: BaseException) -> None:
        """Tell those who wait what no other conversation could fare better with."""
        if self._cases.get(case.key) is case:
            del self._cases[case.key]
        for future in case.waiting:
            if isinstance(error, CancelledError) or self._closed:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_exception(error)


def _resolve(case: _Case, judgement: Judgement) -> None:
    for future in case.waiting:
        if future.set_running_or_notify_cancel():
            future.set_result(judgement)


_CLIENT = frozenset({"concurrency", "timeout_s", "retries", "key_variable", "pause_s"})


def _opened(endpoint_or_model: str, model: str | None, settings: Mapping[str, Any]) -> Asking:
    if not endpoint_or_model.startswith(("http://", "https://")):
        if model is not None:
            raise ValueError("a judge's model has a name of its own only at a server")
        return InProcess.load(endpoint_or_model, **settings)
    named = {"timeout_s": 120.0, **{name: value for name, value in settings.items() if name in _CLIENT}}
    client = Client(endpoint_or_model, model=model or DEFAULT_MODEL, **named)
    try:
        return Remote(client, **{name: value for name, value in settings.items() if name not in _CLIENT})
    except (TypeError, ValueError):
        client.close()
        raise
