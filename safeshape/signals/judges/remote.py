"""A judging model behind an OpenAI-compatible chat server: gpt-oss-20b on vLLM, or any other."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal

from safeshape.client import Client, Reply
from safeshape.signals.judges.asking import Answer, Question
from safeshape.signals.rubric import schema

Structured = Literal["auto", "always", "never"]
Role = Literal["system", "user"]
# How servers name what they refuse: OpenAI's field, its kind, and vLLM's and llama.cpp's ways of doing it.
_NAMES_OF_STRUCTURE = ("response_format", "json_schema", "structured", "guided", "grammar", "schema")


class Remote:
    """Asks a chat server. See `Judge` for the settings.

    Structured output: with "auto" the answer's JSON schema goes along until the server refuses it by name, and from
    then on it is left out for the rest of the run; the store keeps beside each verdict whether it was asked for.
    """

    def __init__(
        self,
        client: Client,
        *,
        temperature: float = 0.0,
        temperature_again: float = 0.7,
        seed: int = 0,
        max_tokens: int = 4096,
        structured: Structured = "auto",
        rubric_role: Role = "system",
        request: Mapping[str, Any] | None = None,
        price_prompt: float | None = None,
        price_completion: float | None = None,
    ) -> None:
        self.client, self.ahead = client, 4 * client.concurrency
        self.temperature, self.temperature_again, self.seed = temperature, temperature_again, seed
        self.max_tokens, self.structured, self.rubric_role = max_tokens, structured, rubric_role
        self.request = dict(request or {})
        self.price_prompt, self.price_completion = price_prompt, price_completion
        self.refused: str | None = None
        self._served: dict[str, Any] | None = None

    def submit(self, question: Question) -> "Future[Answer]":
        """Start on a question."""
        found: Future[Answer] = Future()
        self._ask(question, found)
        return found

    def _ask(self, question: Question, found: "Future[Answer]") -> None:
        structured = self.structured == "always" or (self.structured == "auto" and self.refused is None)
        asked = self.client.submit("chat", self._body(question, structured))

        def give_up(waiting: "Future[Answer]") -> None:
            if waiting.cancelled():
                asked.cancel()

        def take(replied: "Future[Reply]") -> None:
            if replied.cancelled():
                found.cancel()
                return
            error = replied.exception()
            if error is None and structured and self.structured == "auto" and self._refuses(replied.result()):
                self._ask(question, found)
                return
            if not found.set_running_or_notify_cancel():
                return
            if error is not None:
                found.set_exception(error)
            else:
                found.set_result(_answer(replied.result(), structured))

        found.add_done_callback(give_up)
        asked.add_done_callback(take)

    def _refuses(self, reply: Reply) -> bool:
        """Whether the server will have no structured output; remembered with its words."""
        words = str(reply.error).lower()
        if reply.code not in (400, 422, 501) or not any(name in words for name in _NAMES_OF_STRUCTURE):
            return False
        self.refused = self.refused or reply.error
        return True

    def _body(self, question: Question, structured: bool) -> dict[str, Any]:
        if self.rubric_role == "system":
            messages = [{"role": "system", "content": question.told}, {"role": "user", "content": question.shown}]
        else:
            messages = [{"role": "user", "content": f"{question.told}\n\n{question.shown}"}]
        body: dict[str, Any] = {
            "messages": messages,
            "temperature": self.temperature if question.tried == 0 else self.temperature_again,
            "seed": self.seed + question.tried,
            "max_tokens": self.max_tokens,
        }
        if structured:
            form = {"name": "verdict", "strict": True, "schema": schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        fields = {name: value for name, value in self.request.items() if value is not None}
        body = {name: value for name, value in body.items() if name not in self.request}
        # The library's client knows some fields by name and passes on what stands in `extra_body` unseen.
        return {**body, "extra_body": fields} if fields else body

    def identity(self) -> dict[str, Any]:
        """The model's name at the server and the settings of every request."""
        return {
            "model": self.client.model,
            "engine": "server",
            "temperature": self.temperature,
            "temperature_again": self.temperature_again,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
            "rubric_role": self.rubric_role,
            # Tables cannot hold a column without fields.
            **({"request": self.request} if self.request else {}),
        }

    def maker(self) -> dict[str, Any]:
        """What the server tells of its weights: vLLM their path, llama.cpp their size. Asks it the first time.

        Errors: ValueError in one sentence when it cannot be reached, refuses the key or serves other models only.
        """
        if self._served is None:
            told = self.client.check()
            self._served = {key: told[key] for key in ("root", "parent", "meta") if told.get(key) is not None}
        return {"served": self._served}

    def counters(self) -> dict[str, Any]:
        """Requests, retries, failures and tokens; the cost where prices are known; why the schema was refused."""
        done = self.client.counters
        found: dict[str, Any] = {
            "requests": done.requests,
            "retries": done.retries,
            "failures": done.failures,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "structured_refused": self.refused,
            "cost": None,
        }
        if self.price_prompt is not None and self.price_completion is not None:
            tokens_cost = done.prompt_tokens * self.price_prompt + done.completion_tokens * self.price_completion
            found["cost"] = tokens_cost / 1e6
        return found

    def close(self) -> None:
        """Give up what is under way and close the connections."""
        self.client.close()


def _answer(reply: Reply, structured: bool) -> Answer:
    """The model's text in a reply; reasoning stands in a field of its own there and is passed over."""
    if reply.data is None:
        return Answer(error=reply.error)
    choices = reply.data.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    notes = {"answered_by": reply.data.get("model"), "structured": structured}
    if isinstance(first, Mapping) and first.get("finish_reason") == "length":
        return Answer(again=True, error="the judge's answer was cut off at max_tokens", notes=notes)
    if not isinstance(text, str):
        return Answer(again=True, error="the judge's answer holds no text", notes=notes)
    return Answer(text=text, notes=notes)
