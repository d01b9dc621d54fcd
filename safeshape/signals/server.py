"""A guard behind an OpenAI-compatible completions server (vLLM, SGLang, llama.cpp) instead of in this process.

The conversation is rendered and tokenised here, so that the server reads exactly the tokens that a guard in this
process would: prompts go out as token ids, to which no server adds a token of its own. One answer token is asked for,
with the log-probabilities of the likeliest tokens; their difference is the difference of the logits, so V is exact.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from safeshape.client import Client, Reply
from safeshape.data import Message, answer_of
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.types import Score, Span

OnError = Literal["stop", "keep"]
PromptOf = Callable[[Sequence[Message], str], list[int]]
DEVIATION = 1e-3  # how far a V may be from its true value where a label is too unlikely to be listed
_HELLO: list[Message] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]


def label_ids(tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """The token ids of every class: `labels` maps "safe" and "unsafe" to the tokens that mean it.

    A label is text that is one token, or a token by its name in the vocabulary.
    Errors: ValueError for a label that is neither, and for a class without labels.
    """
    found = {}
    for name in ("safe", "unsafe"):
        if not labels.get(name):
            raise ValueError(f"a guard behind a server needs label tokens that mean {name}")
        found[name] = tuple(_token_id(tokenizer, label) for label in labels[name])
    return found


def _token_id(tokenizer: PreTrainedTokenizerBase, label: str) -> int:
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 and label in tokenizer.get_vocab():
        ids = [tokenizer.get_vocab()[label]]
    if len(ids) != 1:
        raise ValueError(f"guard label {label!r} is {len(ids)} tokens for this guard's tokenizer; it must be one")
    return int(ids[0])


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


def p_safe_of(
    listed: Sequence[tuple[int | str, float]],
    ids: Mapping[str, Sequence[int]],
    texts: Mapping[int, str],
    *,
    wanted: int,
) -> tuple[float, float]:
    """V from the listed log-probabilities, and how far it may be off: 0 where every label is listed.

    A label that is not among the `wanted` likeliest has at most the probability of the last of them. V is then the
    middle of what that leaves. `texts`: the label tokens' texts, for servers that tell no ids.
    Errors: ValueError when V may be off by more than `DEVIATION`.
    """
    values = dict(listed)
    least = math.exp(listed[min(wanted, len(listed)) - 1][1])
    mass, missing = {"safe": 0.0, "unsafe": 0.0}, {"safe": 0, "unsafe": 0}
    for name in mass:
        for token in ids[name]:
            value = values.get(token, values.get(texts[token]))
            if value is None:
                missing[name] += 1
            else:
                mass[name] += math.exp(value)
    safe, unsafe = mass["safe"], mass["unsafe"]
    if safe + unsafe == 0:
        raise ValueError(f"no label is among the {len(listed)} likeliest tokens")
    low = safe / (safe + unsafe + missing["unsafe"] * least)
    most = safe + missing["safe"] * least
    high = most / (most + unsafe)
    if high - low > 2 * DEVIATION:
        raise ValueError(
            f"a label is not among the {len(listed)} likeliest tokens and may matter; ask for more of them"
        )
    return (low + high) / 2, (high - low) / 2


@dataclass(kw_only=True)
class _Plan:
    """One conversation on its way: where its chunks end, the scores so far, the first failure."""

    index: int
    ends: Sequence[int] = ()
    values: list[float] = field(default_factory=list)
    error: str | None = None


class ServerGuard:
    """A guard behind a server. `bounded`: how many scores so far were read from a bound because a label was not listed.

    `client`: asks the server. `prompt_of`: what the guard reads for a conversation and a partial answer, as token ids.
    `labels`: see `label_ids`. `top_logprobs`: how many tokens to list; vLLM allows 20 unless told otherwise.
    `identity`: what stands in the scored data beside model, chunk and unit.
    """

    def __init__(
        self,
        client: Client,
        *,
        tokenizer: PreTrainedTokenizerBase,
        prompt_of: PromptOf,
        labels: Mapping[str, Sequence[str]],
        identity: Mapping[str, Any],
        top_logprobs: int = 20,
    ) -> None:
        self.client, self.tokenizer, self.prompt_of = client, tokenizer, prompt_of
        self.ids = label_ids(tokenizer, labels)
        self.texts = {token: str(tokenizer.decode([token])) for ids in self.ids.values() for token in ids}
        self._identity, self.top_logprobs = dict(identity), top_logprobs
        self.bounded = 0

    def check(self) -> dict[str, Any]:
        """Try one request before the run; returns what the server says about the model.

        Errors: ValueError in one sentence when the server cannot be used as a guard.
        """
        served = self.client.check()
        prompt = self.prompt_of(_HELLO, "Hello.")
        reply = self.client.submit("completions", self._request(prompt)).result()
        try:
            likeliest(self._answered(reply, len(prompt)))
        except ValueError as error:
            raise ValueError(f"the server at {self.client.url} cannot serve as a guard: {error}") from error
        return served

    def identity(self, chunk: int, unit: Unit) -> dict[str, Any]:
        """What made a score."""
        return {**self._identity, "model": self.client.model, "chunk": chunk, "unit": unit}

    def score_many(
        self,
        conversations: Iterable[Sequence[Message]],
        *,
        chunk: int = 5,
        unit: Unit = "words",
        on_error: OnError = "stop",
    ) -> Iterator[Score]:
        """Score a stream of conversations in order, one request per partial answer.

        A conversation that failed has `p_safe` None and says why. `on_error` "stop" raises instead.
        Errors: ValueError that names the conversation, as `row 3: ...`; and for what no other request could mend.
        """
        identity = self.identity(chunk, unit)
        for (plan, tokens, last), reply in self.client.stream(
            "completions", self._requests(conversations, chunk, unit)
        ):
            if reply is not None and plan.error is None:
                try:
                    plan.values.append(self._value(reply, tokens))
                except ValueError as error:
                    plan.error = str(error)
            if plan.error is not None and on_error == "stop":
                raise ValueError(f"row {plan.index}: {plan.error}")
            if last:
                yield _score(plan, identity)

    def _requests(
        self, conversations: Iterable[Sequence[Message]], chunk: int, unit: Unit
    ) -> Iterator[tuple[tuple[_Plan, int, bool], dict[str, Any] | None]]:
        """Each with its conversation, the number of its tokens, and whether it is the conversation's last."""
        for index, messages in enumerate(conversations):
            plan = _Plan(index=index)
            try:
                answer = answer_of({"messages": messages})
                ends = chunk_ends(answer, chunk, unit, self.tokenizer)
                prompts = [self.prompt_of(messages, answer[:end]) for end in ends]
            except ValueError as error:
                plan.error = str(error)
                yield (plan, 0, True), None
                continue
            plan.ends = ends
            # In order: a server with a prefix cache has read most of each prompt before.
            for end, prompt in zip(ends, prompts, strict=True):
                yield (plan, len(prompt), end == ends[-1]), self._request(prompt)

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

    def _value(self, reply: Reply, tokens: int) -> float:
        listed = likeliest(self._answered(reply, tokens))
        value, deviation = p_safe_of(listed, self.ids, self.texts, wanted=self.top_logprobs)
        self.bounded += deviation > 0
        return value


def _score(plan: _Plan, identity: dict[str, Any]) -> Score:
    if plan.error is not None:
        return Score(signal="star", p_safe=None, scorer=identity, error=plan.error)
    starts = [0, *plan.ends[:-1]]
    spans = tuple(Span(start=a, end=b, p_safe=p) for a, b, p in zip(starts, plan.ends, plan.values, strict=True))
    return Score(signal="star", p_safe=spans[-1].p_safe, spans=spans, scorer=identity)
