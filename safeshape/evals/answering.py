"""Answers of a model to many prompts, in batches or from a server, each kept in the store as it arrives.

An answer is found again by its prompt, the model's weights, the settings it was drawn with and its number among the
samples; so a run that was killed goes on, and no run reads the answers of another model.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2.exceptions import TemplateError
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safeshape.client import Client, Reply
from safeshape.data import Message
from safeshape.evals.records import Answered
from safeshape.models import Sampling, generate_batches, load
from safeshape.store import Store, canonical, content_key

_BLOCK = 256  # prompts sorted by length at once: what a killed run loses is at most one batch


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer that is wanted. `sampling` None: greedy. `seed`, `sample`: which of the answers that may be drawn."""

    index: int
    messages: Sequence[Message]
    max_new_tokens: int
    sampling: Sampling | None = None
    seed: int = 0
    sample: int = 0

    def settings(self) -> dict[str, Any]:
        """Everything beside prompt and model that changes the answer."""
        if self.sampling is None:
            return {"max_new_tokens": self.max_new_tokens, "greedy": True}
        drawn = {**asdict(self.sampling), "seed": self.seed, "sample": self.sample}
        return {"max_new_tokens": self.max_new_tokens, **drawn}

    def noise(self) -> int:
        """The seed of this answer's random numbers, its own."""
        digest = hashlib.sha256(canonical([list(map(dict, self.messages)), self.seed, self.sample])).digest()
        return int.from_bytes(digest[:8], "big")


class Answering(Protocol):
    """A model that can be asked."""

    name: str

    def identity(self) -> dict[str, Any]:
        """Everything about the model that changes its answers, as plain JSON."""

    def answer(self, asks: Sequence[Ask]) -> Iterator[list[Answered]]:
        """Some answers at a time, in any order; each carries the *position* of its ask as `index`."""

    def close(self) -> None:
        """Give up what is under way."""


def weights_hash(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 over the configuration and all weights and buffers, adapters with their scaling included."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_name_or_path")}
    adapters = {name: one.to_dict() for name, one in model.peft_config.items()} if isinstance(model, PeftModel) else {}
    for adapter in adapters.values():
        adapter.pop("base_model_name_or_path", None)  # where it lies changes no answer
    digest.update(json.dumps([config, adapters], sort_keys=True, default=_plain).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not have, of a configuration: sets of names, and types."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


class LocalModel:
    """A Hugging Face model in this process. `batch_size`: answers generated at once; it changes no answer.

    A prompt that the chat template rejects, or that fills all the model can read, has no answer but the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        batch_size: int = 64,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(f"{name}: the tokenizer has no chat template")
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self._identity: dict[str, Any] | None = None
        self._reads: int | None = model.config.get_text_config().to_dict().get("max_position_embeddings")

    def identity(self) -> dict[str, Any]:
        """Hashes of the weights, of the tokenizer with its template, and of the model's own generation settings."""
        if self._identity is None:
            text = self.tokenizer.backend_tokenizer.to_str() + str(self.tokenizer.chat_template)
            self._identity = {
                "engine": "local",
                "weights": weights_hash(self.model),
                "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
                "generation": self.model.generation_config.to_diff_dict(),
                "dtype": str(self.model.dtype),
                "device": self.model.device.type,
            }
        return self._identity

    def answer(self, asks: Sequence[Ask]) -> Iterator[list[Answered]]:
        """Batches of answers, of asks that share their settings."""
        groups: dict[tuple[int, Sampling | None], list[int]] = {}
        for place, ask in enumerate(asks):
            problem = self._problem(ask)
            if problem is not None:
                yield [Answered(index=place, sample=ask.sample, text=None, error=problem)]
            else:
                groups.setdefault((ask.max_new_tokens, ask.sampling), []).append(place)
        for (max_new_tokens, sampling), places in groups.items():
            batches = generate_batches(
                self.model,
                self.tokenizer,
                [asks[place].messages for place in places],
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                sampling=sampling,
                seeds=None if sampling is None else [asks[place].noise() for place in places],
            )
            for batch in batches:
                yield [
                    Answered(index=places[row], sample=asks[places[row]].sample, text=text)
                    for row, text in batch.items()
                ]

    def _problem(self, ask: Ask) -> str | None:
        """Why a prompt cannot be answered; None where it can."""
        begun = ask.messages[-1]["role"] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in ask.messages],
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except TemplateError as error:
            return f"the chat template rejects the conversation: {error}"
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._reads is None or tokens < self._reads:
            return None
        return f"the prompt has {tokens} tokens; the model reads {self._reads}"

    def close(self) -> None:
        """Nothing is under way."""


class ServerModel:
    """A model behind an OpenAI-compatible chat server. `request`: further fields of every request.

    What the server has behind the name cannot be seen from here: address, name and what it lists are the identity.
    """

    def __init__(self, client: Client, *, request: Mapping[str, Any] | None = None) -> None:
        self.client, self.name, self.request = client, client.model, dict(request or {})
        for field in sorted(_OURS & set(self.request)):
            raise ValueError(f"request must not hold {field!r}; it has a setting of its own")
        served = client.check()
        self._served = {key: served[key] for key in ("root", "parent", "meta") if served.get(key) is not None}

    def identity(self) -> dict[str, Any]:
        """Address, name, and what the server tells of the weights."""
        return {
            "engine": "server",
            "url": self.client.url,
            "model": self.client.model,
            "served": self._served,
            "request": self.request,
        }

    def answer(self, asks: Sequence[Ask]) -> Iterator[list[Answered]]:
        """Answers as they arrive, so that a killed run loses none that came. Errors: ValueError as of the client."""
        places = iter(range(len(asks)))
        waiting: dict[Future[Reply], int] = {}
        try:
            while True:
                for place in islice(places, 2 * self.client.concurrency - len(waiting)):
                    waiting[self.client.submit("chat", self._body(asks[place]))] = place
                if not waiting:
                    return
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for one in done:
                    place = waiting.pop(one)
                    yield [_read(place, asks[place], one.result())]
        finally:
            for one in waiting:
                one.cancel()

    def close(self) -> None:
        """Give up what is under way and close the connections."""
        self.client.close()

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [dict(message) for message in ask.messages],
            "max_tokens": ask.max_new_tokens,
            "temperature": 0.0 if ask.sampling is None else ask.sampling.temperature,
        }
        if ask.sampling is not None:
            body |= {"top_p": ask.sampling.top_p, "seed": ask.noise() % 2**31}
        more = dict(self.request)
        if ask.messages[-1]["role"] == "assistant":  # as vLLM and SGLang name it
            more = {"add_generation_prompt": False, "continue_final_message": True, **more}
        return {**body, "extra_body": more} if more else body


_OURS = {"messages", "model", "n", "max_tokens", "temperature", "top_p", "seed", "stream"}


def _read(place: int, ask: Ask, reply: Reply) -> Answered:
    if reply.data is None:
        return Answered(index=place, sample=ask.sample, text=None, error=reply.error)
    choices = reply.data.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(text, str):
        return Answered(index=place, sample=ask.sample, text=None, error="the server's answer holds no text")
    begun = str(ask.messages[-1]["content"]) if ask.messages[-1]["role"] == "assistant" else ""
    return Answered(index=place, sample=ask.sample, text=(begun + text).rstrip() if begun else text.strip())


def load_model(
    name: str, *, revision: str = "main", dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A causal model from a folder or the Hub; a PEFT folder is put onto its base model.

    Errors: OSError or ValueError from the libraries when it cannot be had.
    """
    folder = Path(name)
    if not (folder / "adapter_config.json").exists():
        model, tokenizer = load(name, revision=revision, dtype=dtype)
        return model.to(device), tokenizer
    adapter = PeftConfig.from_pretrained(name)
    if not adapter.base_model_name_or_path:
        raise ValueError(f"{name}: adapter_config.json does not name the base model")
    model, tokenizer = load(adapter.base_model_name_or_path, revision=adapter.revision or "main", dtype=dtype)
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(name)
    return PeftModel.from_pretrained(model, name).eval().to(device), tokenizer


def answers(
    model: Answering,
    asks: Sequence[Ask],
    store: Store,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Answered], int]:
    """The answers in the order of the asks, and how many of them the store had. Failed ones are not kept."""
    maker = model.identity()
    keys = [content_key([dict(m) for m in ask.messages], {**maker, "settings": ask.settings()}) for ask in asks]
    kept = store.get_many("generations", list(dict.fromkeys(keys)))
    found: dict[str, Answered] = {}
    missing: dict[str, Ask] = {}
    for key, ask in zip(keys, asks, strict=True):
        if key in kept:
            found[key] = Answered(index=0, sample=0, text=kept[key]["text"])
        else:
            missing.setdefault(key, ask)
    places, done = list(missing), len(asks) - len(missing)
    progress(done, len(asks))
    for begin in range(0, len(places), _BLOCK):
        block = places[begin : begin + _BLOCK]
        for batch in model.answer([missing[key] for key in block]):
            store.put_many("generations", {block[a.index]: {"text": a.text} for a in batch if a.text is not None})
            found |= {block[a.index]: a for a in batch}
            done += len(batch)
            progress(done, len(asks))
    told = [
        Answered(index=ask.index, sample=ask.sample, text=found[key].text, error=found[key].error)
        for key, ask in zip(keys, asks, strict=True)
    ]
    return told, sum(key in kept for key in keys)
