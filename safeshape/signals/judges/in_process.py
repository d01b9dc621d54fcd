"""A judging model in this process: greedy generation in batches, by a thread of its own.

The judged text is tokenised apart from the chat template, with special tokens not parsed, so that no text can end its
turn or begin another's.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safeshape.models.loading import load
from safeshape.signals.judges.asking import Answer, Question
from safeshape.signals.scorers import fingerprint

Role = Literal["system", "user"]
_PLACE = "\ue000evidence\ue001"
_Waiting = tuple[list[int], "Future[Answer]"]


def tokens(tokenizer: PreTrainedTokenizerBase, question: Question, role: Role) -> list[int]:
    """The tokens of a question: the template's own with its special tokens, the shown text's without any.

    Errors: ValueError where the template has no system turn, no place for the text or is missing.
    """
    if role == "system":
        messages = [{"role": "system", "content": question.told}, {"role": "user", "content": _PLACE}]
    else:
        messages = [{"role": "user", "content": f"{question.told}\n\n{_PLACE}"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the judge's chat template rejects the {role} turn: {error}") from error
    before, place, after = str(text).partition(_PLACE)
    if not place or _PLACE in after:
        raise ValueError("the judge's chat template does not show a message once and as it is")
    ids: list[int] = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids += tokenizer(question.shown, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids + list(tokenizer(after, add_special_tokens=False)["input_ids"])


class InProcess:
    """Asks a causal model. `batch_size`: questions in one generation. See `Judge` for the other settings.

    Greedy; a question that is asked again differs by the note that says so. No random numbers are drawn, so training
    beside it is not disturbed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str = "main",
        max_tokens: int = 4096,
        batch_size: int = 8,
        rubric_role: Role = "system",
    ) -> None:
        if max_tokens < 1 or batch_size < 1:
            raise ValueError("max_tokens and batch_size must be at least 1")
        if tokenizer.chat_template is None:
            raise ValueError(f"judge {name}: the tokenizer has no chat template")
        self.model, self.tokenizer, self.name, self.revision = model.eval(), tokenizer, name, revision
        self.max_tokens, self.batch_size, self.rubric_role = max_tokens, batch_size, rubric_role
        self.ahead = 4 * batch_size
        self.prompt_tokens = self.completion_tokens = self.requests = 0
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._door, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="judge model", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, name: str, *, revision: str = "main", dtype: str = "float32", device: str = "cpu", **settings: Any
    ) -> "InProcess":
        """A model from a folder or the Hub. Errors: OSError or ValueError when it cannot be had."""
        model, tokenizer = load(name, revision=revision, dtype=dtype)
        return cls(model.to(device), tokenizer, name=name, revision=revision, **settings)

    def submit(self, question: Question) -> "Future[Answer]":
        """Queue a question. Errors: ValueError once it is closed, or for a chat template that cannot ask it."""
        ids = tokens(self.tokenizer, question, self.rubric_role)
        found: Future[Answer] = Future()
        limit = self.model.config.get_text_config().max_position_embeddings
        if len(ids) + self.max_tokens > limit:
            reason = f"the conversation makes {len(ids)} tokens with the rubric; the judge reads {limit}"
            found.set_result(Answer(error=f"{reason}, {self.max_tokens} of them kept for its answer"))
            return found
        with self._door:
            if self._closed:
                raise ValueError("the judge is closed")
            self._queue.put((ids, found))
        return found

    def _work(self) -> None:
        ended = False
        while not ended:
            batch: list[_Waiting] = []
            entry = self._queue.get()
            while True:
                ended = ended or entry is None
                if entry is not None and not self._closed and entry[1].set_running_or_notify_cancel():
                    batch.append(entry)
                elif entry is not None:
                    entry[1].cancel()
                if ended or len(batch) == self.batch_size or self._queue.empty():
                    break
                entry = self._queue.get()
            try:
                for (_, found), answer in zip(batch, self._answers([ids for ids, _ in batch]), strict=True):
                    found.set_result(answer)
            except Exception as error:
                for _, found in batch:
                    found.set_exception(error)

    def _answers(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Greedy answers to token lists; one by one where they outgrow the device's memory together."""
        try:
            return self._generated(prompts) if prompts else []
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                return [Answer(error="the conversation is too long for the memory of the device")]
            return [answer for ids in prompts for answer in self._answers([ids])]

    def _generated(self, prompts: Sequence[list[int]]) -> list[Answer]:
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        width = max(map(len, prompts))
        ids_BL = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=self.model.device)
        mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        settings = GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends
        )
        with torch.inference_mode():
            out_BL = self.model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=settings)
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        return [self._read(len(ids), row[width:], stops) for ids, row in zip(prompts, out_BL.tolist(), strict=True)]

    def _read(self, asked: int, written: list[int], stops: set[int]) -> Answer:
        end = next((at for at, token in enumerate(written) if token in stops), None)
        self.requests += 1
        self.prompt_tokens += asked
        self.completion_tokens += len(written) if end is None else end + 1
        if end is None:
            return Answer(error="the judge's answer was cut off at max_tokens", again=True)
        # With special tokens: the mark that ends a model's reasoning may be one.
        return Answer(text=self.tokenizer.decode(written[:end], skip_special_tokens=False))

    def identity(self) -> dict[str, Any]:
        """The model and how it is asked."""
        return {
            "model": self.name,
            "engine": "in process",
            "revision": self.revision,
            "max_tokens": self.max_tokens,
            "rubric_role": self.rubric_role,
        }

    def maker(self) -> dict[str, Any]:
        """The hash of the model's files in place of their path, and the precision it runs in."""
        return {"model": fingerprint(self.name, self.revision), "dtype": str(self.model.dtype)}

    def counters(self) -> dict[str, Any]:
        """Questions and tokens; nothing is paid for."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": None,
        }

    def close(self) -> None:
        """Give up what waits, and end after what is being generated."""
        with self._door:
            first, self._closed = not self._closed, True
        if first:
            self._queue.put(None)
            self._thread.join()
