"""Guard models as a signal: the Safety Trajectory Assessment of Response (STAR).

A guard is a row of the table in `guard_rows.py`, which says how it is asked and read. Every partial response is
rendered as the row says, tokenised as a whole and forwarded; V = exp(l_safe) / (exp(l_safe) + exp(l_unsafe)) on the raw
logits of the label tokens. This is the naive form, one forward per prefix: the truth that faster scorers are tested
against.

Shape suffixes: S partial answers, R reads per partial answer, N = S * R sequences, K label tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message, answer_of
from safeshape.models import load
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.signals.classifiers import Classifier, load_classifier
from safeshape.signals.guard_rows import GuardRow, fingerprint, label_ids, p_safe_of, render, row_of, suffixes
from safeshape.signals.prefix import naive_label_logits
from safeshape.signals.reading import Item, Reading
from safeshape.signals.sharpen import Sharpen
from safeshape.signals.streams import StreamGuard, load_stream
from safeshape.types import Score, Span


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A loaded guard. `identity` goes into the scored data: model, revision, row.

    `labels`: the token of each label of the row. `suffixes`: the tokens appended to a text for each read.
    """

    name: str
    row: GuardRow
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]
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
        return render(self.row, self.tokenizer, messages, partial)

    def p_safe(self, texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """V for rendered texts, batched by length. Padding is on the left and masked: it never changes a score."""
        tokens = self.tokenizer(list(texts), add_special_tokens=self.row.special_tokens)["input_ids"]
        ids = [[*text, *suffix] for text in tokens for suffix in self.suffixes]
        logits_NK = naive_label_logits(self.model, ids, self.labels, batch_size=batch_size)
        return [float(value) for value in p_safe_of(logits_NK, self.row)]

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]:
        """p_safe of the partial answers of each conversation that end at the given character offsets."""
        texts = [self.render(messages, messages[-1]["content"][:end]) for messages, ends in items for end in ends]
        scores = iter(self.p_safe(texts, batch_size=batch_size))
        return [[next(scores) for _ in ends] for _, ends in items]

    def identity(self, chunk: int, unit: Unit) -> dict[str, Any]:
        """What made a score: enough to make it again."""
        return {
            "guard": self.name,
            "model": self.model.config._name_or_path,
            "revision": self.revision,
            "row": fingerprint(self.row, self.tokenizer),
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


AnyGuard = Guard | Classifier | StreamGuard


def load_guard(
    row: str | Mapping[str, Any],
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    sharpen: bool | Sharpen | None = None,
) -> AnyGuard:
    """Load a guard by the name of its row, from a YAML file with a row, or by a row of the caller's own.

    `model`: a path or Hub id, or a loaded model together with its `tokenizer`; default: the row's own weights.
    `revision`: of a Hub id, default main. `sharpen`: True for the near-hard scores of the released STAR-DSS code;
    default: as the row says.
    Errors: ValueError in one sentence for an unknown row or field, labels that the vocabulary lacks or that are not
    single tokens, a tokenizer without a chat template where the row has none, a row without weights, or a revision of
    a loaded model.
    """
    name, found = row_of(row)
    if sharpen is not None:
        found = replace(found, sharpen=Sharpen() if sharpen is True else sharpen or None)
    source = model if model is not None else found.model
    if source is None:
        raise ValueError(f"guard {name!r} has no weights of its own; give model=")
    if revision is not None and not isinstance(source, str):
        raise ValueError(f"guard {name!r}: a loaded model has no revision to choose, got {revision!r}")
    revision = revision or "main"
    if found.kind == "classifier":
        guard: AnyGuard = load_classifier(
            name, found, source, tokenizer=tokenizer, revision=revision, dtype=dtype, device=device
        )
    elif found.kind == "stream":
        guard = load_stream(name, found, source, tokenizer=tokenizer, revision=revision, dtype=dtype, device=device)
    else:
        guard = _load_labels(name, found, source, tokenizer=tokenizer, revision=revision, dtype=dtype, device=device)
    if found.chat_template is None and guard.tokenizer.chat_template is None:
        raise ValueError(f"guard {name!r}: the tokenizer has no chat template, and the row gives none")
    return guard


def _load_labels(
    name: str,
    row: GuardRow,
    source: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str,
    dtype: str,
    device: str,
) -> Guard:
    if isinstance(source, str):
        source, own = load(source, revision=revision, dtype=dtype)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise ValueError("a loaded guard model needs its tokenizer")
    labels, size = label_ids(row, tokenizer), source.config.get_text_config().vocab_size
    for label, token in zip(row.labels, labels, strict=True):
        if token >= size:
            raise ValueError(f"guard label {label!r} is token {token}, but the model's vocabulary ends at {size}")
    return Guard(
        name=name,
        row=row,
        model=source.to(device).eval(),
        tokenizer=tokenizer,
        labels=labels,
        suffixes=suffixes(row, tokenizer),
        revision=revision,
    )
