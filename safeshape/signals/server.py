"""A guard behind an OpenAI-compatible completions server (vLLM, SGLang, llama.cpp) instead of in this process.

The conversation is rendered and tokenised here, so that the server reads exactly the tokens that a guard in this
process would: prompts go out as token ids, to which no server adds a token of its own. One answer token is asked for,
with the log-probabilities of the likeliest tokens; their difference is the difference of the logits, so V is exact.

Shape suffixes: R reads per partial answer, K label tokens.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from safeshape.client import Client, Reply
from safeshape.data import Message, answer_of
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.signals.guard_rows import GuardRow, fingerprint, label_ids, p_safe_of, render, suffixes
from safeshape.signals.reading import Failure, Item, Reading, score_of
from safeshape.types import Score

OnError = Literal["stop", "keep"]
DEVIATION = 1e-3  # how far a V may be from its true value where a label is too unlikely to be listed
_MANY = 10  # unlisted labels of one partial answer; more are not worth bounding
_HELLO: list[Message] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]


def likeliest(data: Mapping[str, Any]) -> list[tuple[int | str, float]]:
    """The likeliest first tokens of a completion with their log-probabilities, likeliest first.

    A token is its id where the server tells it, else its text. Errors: ValueError for a reply without them.
    """
    choices = data.get("choices")
    block = choices[0].get("logprobs") if isinstance(choices, list) and choices else None
    pairs: list[tuple[int | str, Any]] = []
    if isinstance(block, Mapping) and block.get("content"):  # as in chat completions: llama.cpp
        listed = block["content"][0].get("top_logprobs") or []
        pairs = [(entry["id"] if "id" in entry else entry["token"], entry["logprob"]) for entry in listed]
    elif isinstance(block, Mapping) and block.get("top_logprobs"):  # as completions have always had it: vLLM, SGLang
        pairs = [(_named(name), value) for name, value in block["top_logprobs"][0].items()]
    if not pairs:
        raise ValueError("the server gave no log-probabilities")
    for _, value in pairs:
        if not isinstance(value, int | float) or not value <= 1e-6:
            raise ValueError(f"the server gave {value!r} as a log-probability")
    return sorted(((name, float(value)) for name, value in pairs), key=lambda pair: -pair[1])


def _named(name: str) -> int | str:
    number = name.removeprefix("token_id:")
    return int(number) if number != name and number.isdigit() else name


def bounded_p_safe(
    logprobs: Sequence[Sequence[float | None]], least: Sequence[float], row: GuardRow
) -> tuple[float, float]:
    """V of one partial answer from the log-probabilities of its labels, and how far it may be off.

    `logprobs`: those of each of the row's reads, shape (R, K), None where a label was not listed; `least`: the smallest
    that the server would have listed, shape (R,). An unlisted label lies between nothing and that. V is monotone in
    every label's probability, so its extremes are among the ends; the middle of them is taken.
    Errors: ValueError when V may be off by more than `DEVIATION`.
    """
    for values in logprobs:
        if all(value is None or math.exp(value) == 0 for value in values):
            raise ValueError("no label is among the likeliest tokens that the server listed")
    open_ends = [(r, k) for r, values in enumerate(logprobs) for k, value in enumerate(values) if value is None]
    if len(open_ends) > _MANY:
        raise ValueError(f"{len(open_ends)} labels are not among the likeliest tokens that the server listed")
    reads_RK = torch.tensor([[-math.inf if v is None else v for v in values] for values in logprobs])
    found = []
    for ends in product((False, True), repeat=len(open_ends)):
        for (r, k), high in zip(open_ends, ends, strict=True):
            reads_RK[r, k] = least[r] if high else -math.inf
        found.append(float(p_safe_of(reads_RK, row)))
    if max(found) - min(found) > 2 * DEVIATION:
        raise ValueError("a label is not among the likeliest tokens that the server listed, and it may matter")
    return (max(found) + min(found)) / 2, (max(found) - min(found)) / 2


@dataclass(kw_only=True)
class _Plan:
    """One conversation on its way: how many partial answers it has, their scores so far, the first failure."""

    ends: Sequence[int] = ()
    values: list[float] = field(default_factory=list)
    reads: list[tuple[list[float | None], float]] = field(default_factory=list)
    error: str | None = None


class ServerGuard:
    """A guard behind a server. `bounded`: how many scores so far were read from a bound because a label was not listed.

    `client`: asks the server. `row`: how the guard is asked and read; `tokenizer`: its own. `revision`: what the caller
    calls the weights behind the server, which cannot be seen from here. `top_logprobs`: how many tokens to list; vLLM
    allows 20 unless told otherwise.
    Errors: ValueError for a row whose scores cannot be had from log-probabilities, and for labels the tokenizer lacks.
    """

    def __init__(
        self,
        client: Client,
        *,
        name: str,
        row: GuardRow,
        tokenizer: PreTrainedTokenizerBase,
        revision: str = "main",
        top_logprobs: int = 20,
    ) -> None:
        if row.kind != "labels":
            raise ValueError(f"guard {name!r} is of kind {row.kind}; a server can run only guards with label tokens")
        if row.sharpen is not None:
            raise ValueError(f"guard {name!r}: sharpen needs the logits themselves, which no server gives")
        if row.chat_template is None and tokenizer.chat_template is None:
            raise ValueError(f"guard {name!r}: the tokenizer has no chat template, and the row gives none")
        self.client, self.name, self.row, self.tokenizer = client, name, row, tokenizer
        self.revision, self.top_logprobs = revision, top_logprobs
        self.labels, self.suffixes = label_ids(row, tokenizer), suffixes(row, tokenizer)
        self.texts = [str(tokenizer.decode([label])) for label in self.labels]
        self.bounded = 0
        self.limit: int | None = None  # tokens that the server holds, prompt and answer; `check` finds it

    def check(self) -> dict[str, Any]:
        """Try one request before the run; returns what the server says about the model.

        Errors: ValueError in one sentence when the server cannot be used as a guard.
        """
        served = self.client.check()
        prompt = self._prompts(_HELLO, "Hello.")[0]
        reply = self.client.submit("completions", self._request(prompt)).result()
        try:
            likeliest(self._answered(reply, len(prompt)))
        except ValueError as error:
            raise ValueError(f"the server at {self.client.url} cannot serve as a guard: {error}") from error
        told = served.get("max_model_len") or (served.get("meta") or {}).get("n_ctx")  # vLLM, llama.cpp
        self.limit = told if isinstance(told, int) else None
        return served

    def identity(self, chunk: int, unit: Unit) -> dict[str, Any]:
        """What made a score."""
        return {
            "guard": self.name,
            "model": self.client.model,
            "revision": self.revision,
            "row": fingerprint(self.row, self.tokenizer),
            "chunk": chunk,
            "unit": unit,
            "engine": "server",
        }

    def score_many(
        self,
        conversations: Iterable[Sequence[Message]],
        *,
        chunk: int = 5,
        unit: Unit = "words",
        on_error: OnError = "stop",
    ) -> Iterator[Score]:
        """Score a stream of conversations in order, one request per partial answer and read.

        A conversation that failed has `p_safe` None and says why. `on_error` "stop" raises instead.
        Errors: ValueError that names the conversation, as `row 3: ...`; and for what no other request could mend.
        """

        def items() -> Iterator[Item | Failure]:
            for messages in conversations:
                try:
                    yield messages, chunk_ends(answer_of({"messages": messages}), chunk, unit, self.tokenizer)
                except ValueError as error:
                    yield Failure(reason=str(error))

        identity = self.identity(chunk, unit)
        for index, (ends, reading) in enumerate(self._readings(items())):
            if isinstance(reading, Failure) and on_error == "stop":
                raise ValueError(f"row {index}: {reading.reason}")
            yield score_of(ends, reading, identity)

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]:
        """p_safe of the partial answers that end at the given offsets. `batch_size` is the server's own affair."""
        return [reading for _, reading in self._readings(items)]

    def _readings(self, items: Iterable[Item | Failure]) -> Iterator[tuple[Sequence[int], Reading]]:
        """The partial answers of each item and what came of them, in order."""
        for (plan, tokens, last), reply in self.client.stream("completions", self._requests(items)):
            if reply is not None and plan.error is None:
                try:
                    self._take(plan, self._answered(reply, tokens))
                except ValueError as error:
                    plan.error = str(error)
            if last:
                yield plan.ends, plan.values if plan.error is None else Failure(reason=plan.error)

    def _requests(
        self, items: Iterable[Item | Failure]
    ) -> Iterator[tuple[tuple[_Plan, int, bool], dict[str, Any] | None]]:
        """Each with its conversation, the number of its tokens, and whether it is the conversation's last."""
        for item in items:
            plan = _Plan()
            try:
                if isinstance(item, Failure):
                    raise ValueError(item.reason)
                messages, plan.ends = item
                answer = str(messages[-1]["content"])
                self._fits(self._prompts(messages, answer)[-1])
                total, number = len(plan.ends) * len(self.suffixes), 0
                # In order: a server with a prefix cache has read most of each prompt before.
                for end in plan.ends:
                    for prompt in self._prompts(messages, answer[:end]):
                        number += 1
                        if plan.error is not None:  # a reply that came meanwhile settled it
                            raise ValueError(plan.error)
                        yield (plan, len(prompt), number == total), self._request(prompt)
            except ValueError as error:
                plan.error = str(error)
                yield (plan, 0, True), None

    def _fits(self, prompt: Sequence[int]) -> None:
        if self.limit is not None and len(prompt) >= self.limit:
            raise ValueError(
                f"the answer makes {len(prompt)} tokens with its prompt; the server reads {self.limit - 1}"
            )

    def _prompts(self, messages: Sequence[Message], partial: str) -> list[list[int]]:
        """What the guard reads for a partial answer, once for each of the row's reads."""
        text = render(self.row, self.tokenizer, messages, partial)
        ids = self.tokenizer(text, add_special_tokens=self.row.special_tokens)["input_ids"]
        return [[*ids, *suffix] for suffix in self.suffixes]

    def _request(self, prompt: list[int]) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": self.top_logprobs,
            # vLLM: two tokens may have the same text, ids are sure. Others pass over it.
            "extra_body": {"return_tokens_as_token_ids": True},
        }

    def _answered(self, reply: Reply, tokens: int) -> dict[str, Any]:
        if reply.data is None:
            raise ValueError(str(reply.error))
        read = (reply.data.get("usage") or {}).get("prompt_tokens")
        if read is not None and read != tokens:
            raise ValueError(f"the server read {read} tokens where {tokens} were sent")
        return reply.data

    def _take(self, plan: _Plan, data: Mapping[str, Any]) -> None:
        listed = likeliest(data)
        values = dict(listed)
        # The sampled token may stand beside those asked for: it says nothing about the last of them.
        least = listed[min(self.top_logprobs, len(listed)) - 1][1]
        named = zip(self.labels, self.texts, strict=True)
        plan.reads.append(([values.get(label, values.get(text)) for label, text in named], least))
        if len(plan.reads) == len(self.suffixes):
            logprobs, least_R = [values for values, _ in plan.reads], [value for _, value in plan.reads]
            value, deviation = bounded_p_safe(logprobs, least_R, self.row)
            self.bounded += deviation > 0
            plan.values.append(value)
            plan.reads.clear()
