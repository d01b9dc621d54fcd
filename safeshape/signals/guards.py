"""Guard models as a signal: the Safety Trajectory Assessment of Response (STAR).

A guard is a row of a table: which tokens mean safe and unsafe, and what stands before them. Every partial response is
rendered with the guard's own chat template, tokenised as a whole and forwarded; V = exp(l_safe) / (exp(l_safe) +
exp(l_unsafe)) on the raw logits of the label tokens. This is the naive form, one forward per prefix: the truth that
faster scorers are tested against.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message, answer_of
from safeshape.models import load
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.signals.guard_rows import GUARDS, GuardRow
from safeshape.signals.prefix import naive_label_logits
from safeshape.types import Score, Span


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A loaded guard. `identity` goes into the scored data: model, revision, row."""

    name: str
    row: GuardRow
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    safe_id: int
    unsafe_id: int
    revision: str

    def score(self, messages: Sequence[Message], *, chunk: int = 5, unit: Unit = "words") -> list[Span]:
        """The score of every partial response of one conversation, as spans over its last message.

        Each span holds V of the response up to its own end (its content visible); spans tile the answer.
        Errors: ValueError when the last message is not a non-empty assistant answer.
        Source: STAR-DSS, arXiv 2505.17196, eq. 1 and 2.
        Differs: prefixes keep the answer's own whitespace, the released code joins words with single blanks; scores are
        soft, the released code reads nearly hard ones from sampled generation settings.
        """
        return list(next(self.score_many([messages], chunk=chunk, unit=unit)).spans)

    def score_many(
        self,
        conversations: Iterable[Sequence[Message]],
        *,
        chunk: int = 5,
        unit: Unit = "words",
        batch_size: int = 64,
        window: int = 64,
    ) -> Iterator[Score]:
        """Score a stream of conversations in order; `window` conversations are read ahead and batched together.

        Errors: ValueError that names the conversation, as `row 3: ...`.
        """
        buffer: list[tuple[str, list[int], list[str]]] = []
        for index, messages in enumerate(conversations):
            try:
                answer = answer_of({"messages": messages})
                ends = chunk_ends(answer, chunk, unit, self.tokenizer)
                buffer.append((answer, ends, [self.render(messages, answer[:end]) for end in ends]))
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from error
            if len(buffer) == window:
                yield from self._flush(buffer, chunk, unit, batch_size)
                buffer = []
        if buffer:
            yield from self._flush(buffer, chunk, unit, batch_size)

    def render(self, messages: Sequence[Message], partial: str) -> str:
        """The text the guard reads for a partial response, up to where its own answer begins."""
        shown = [{"role": m["role"], "content": m["content"]} for m in messages[:-1] if m["role"] != "system"]
        shown.append({"role": "assistant", "content": partial})
        try:
            text = self.tokenizer.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=True, **self.row.template
            )
        except TemplateError as error:
            raise ValueError(f"the guard's chat template rejects the conversation: {error}") from error
        return str(text)

    def p_safe(self, texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """V for rendered texts, batched by length. Padding is on the left and masked: it never changes a score.

        What the guard writes before its label is appended as tokens of its own, as generation would have it: joined to
        the text, two newlines after two newlines may become one other token.
        """
        prefix = self.tokenizer(self.row.answer_prefix, add_special_tokens=False)["input_ids"]
        ids = [row + prefix for row in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        logits_SK = naive_label_logits(self.model, ids, (self.safe_id, self.unsafe_id), batch_size=batch_size)
        return [float(value) for value in torch.sigmoid(logits_SK[:, 0] - logits_SK[:, 1])]

    def identity(self, chunk: int, unit: Unit) -> dict[str, Any]:
        """What made a score: enough to make it again."""
        return {
            "guard": self.name,
            "model": self.model.config._name_or_path,
            "revision": self.revision,
            "chunk": chunk,
            "unit": unit,
        }

    def _flush(
        self, buffer: list[tuple[str, list[int], list[str]]], chunk: int, unit: Unit, batch_size: int
    ) -> Iterator[Score]:
        scores = iter(self.p_safe([text for _, _, texts in buffer for text in texts], batch_size=batch_size))
        for _, ends, _ in buffer:
            starts = [0, *ends[:-1]]
            spans = tuple(Span(start=a, end=b, p_safe=next(scores)) for a, b in zip(starts, ends, strict=True))
            yield Score(signal="star", p_safe=spans[-1].p_safe, spans=spans, scorer=self.identity(chunk, unit))


def _single_token(tokenizer: PreTrainedTokenizerBase, label: str) -> int:
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"guard label {label!r} is {len(ids)} tokens for this guard's tokenizer; it must be exactly one"
        )
    return int(ids[0])


def load_guard(
    row: str | Mapping[str, Any],
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str = "main",
    dtype: str = "float32",
    device: str = "cpu",
) -> Guard:
    """Load a guard by the name of its row or by a row of the caller's own.

    `model`: a path or Hub id, or a loaded model together with its `tokenizer`; default: the row's own weights.
    Errors: ValueError for an unknown row or field, labels that are not single tokens, a tokenizer without a chat
    template, or a row without weights.
    """
    if isinstance(row, Mapping):
        known = {f.name for f in fields(GuardRow)}
        for key in row:
            if key not in known | {"name"}:
                raise ValueError(f"a guard row has no field {key!r}; it has: name, {', '.join(sorted(known))}")
        name, found = str(row.get("name", "own")), GuardRow(**{k: v for k, v in row.items() if k != "name"})
    elif row in GUARDS:
        name, found = row, GUARDS[row]
    else:
        raise ValueError(f"unknown guard {row!r}; known: {', '.join(GUARDS)}, or a row of your own")
    source = model if model is not None else found.model
    if source is None:
        raise ValueError(f"guard {name!r} has no weights of its own; give model=")
    if isinstance(source, str):
        source, tokenizer = load(source, revision=revision, dtype=dtype)
    if tokenizer is None:
        raise ValueError("a loaded guard model needs its tokenizer")
    if tokenizer.chat_template is None:
        raise ValueError(f"guard {name!r}: the tokenizer has no chat template")
    return Guard(
        name=name,
        row=found,
        model=source.to(device).eval(),
        tokenizer=tokenizer,
        safe_id=_single_token(tokenizer, found.safe),
        unsafe_id=_single_token(tokenizer, found.unsafe),
        revision=revision,
    )
