"""Guard models as a signal: the Safety Trajectory Assessment of Response (STAR).

A guard is a row of the table in `guard_rows.py`, which says how it is asked and read. Every partial response is
rendered as the row says and tokenised as a whole; V = exp(l_safe) / (exp(l_safe) + exp(l_unsafe)) on the raw logits of
the label tokens after it. All partial responses of one conversation share one prefill (`prefix.py`); `Guard.p_safe` is
the naive form, one forward per text: the truth that the shared one is tested against.

Shape suffixes: S partial answers, R reads per partial answer, N = S * R sequences, K label tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message, answer_of
from safeshape.models import load
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.signals.classifiers import Classifier, load_classifier
from safeshape.signals.guard_rows import GuardRow, fingerprint, label_ids, p_safe_of, render, row_of, suffixes
from safeshape.signals.partials import Partials, Splice, encodable, splice_rule
from safeshape.signals.prefix import NaiveScorer, choose_scorer, naive_label_logits
from safeshape.signals.reading import Failure, Item, Reading, score_of
from safeshape.signals.refine import Refine, RefineReport
from safeshape.signals.sharpen import Sharpen
from safeshape.signals.stream import OnError, Scorer, Trajectory, trajectories
from safeshape.signals.streams import StreamGuard, load_stream
from safeshape.types import Score, Span

# Read once at the start, to see whether a shared prefill gives this model's own logits.
_SAMPLE = (
    "User: what is a fox?\n\nAgent: A fox is a small animal. It lives in the wood, and it is rarely seen by day.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A loaded guard. `identity` goes into the scored data: model, revision, row.

    `labels`: the token of each label of the row. `suffixes`: the tokens appended to a text for each read.
    `max_tokens`: tokens of one forward with a shared prefill; see `PrefixScorer`.
    """

    name: str
    row: GuardRow
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]
    revision: str
    max_tokens: int | None = None

    @cached_property
    def scorer(self) -> tuple[Scorer, str]:
        """What runs the model, chosen by a check at the first use, and why: `shared prefill`, or `naive: ...`."""
        sample = self.tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        return choose_scorer(self.model, self.labels, sample, max_tokens=self.max_tokens)

    @cached_property
    def splice(self) -> Splice:
        """Where tokens of partial answers may be joined to those of the full one."""
        return splice_rule(self.tokenizer)

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
        refine: bool | Refine = False,
        tolerance: float = 0.05,
        report: RefineReport | None = None,
        on_error: OnError = "stop",
        batch_size: int = 64,
        window: int = 64,
        window_tokens: int = 32768,
    ) -> Iterator[Score]:
        """Score a stream of conversations in order; up to `window` are read ahead and share forwards.

        `refine`: score coarsely, then only where scores move by more than `tolerance` (`refine.py`; give a `Refine` for
        its other settings); `report` then collects what that saved and missed. `on_error`: "stop" raises for the first
        bad row, after all rows before it; "keep" gives it a score of None with its `error` and goes on.
        `batch_size`: texts of one forward, for a guard that cannot share a prefill.
        Errors: ValueError that names the conversation, as `row 3: ...`.
        """
        settings = refine if isinstance(refine, Refine) else Refine(tolerance=tolerance) if refine else None
        identity = self.identity(chunk, unit, settings)

        def prepare(messages: Sequence[Message]) -> tuple[Partials, Sequence[int]]:
            answer = encodable(answer_of({"messages": messages}))
            return self._partials(messages), chunk_ends(answer, chunk, unit, self.tokenizer)

        rows = trajectories(
            conversations,
            self._running(batch_size),
            prepare,
            lambda logits_NK: p_safe_of(logits_NK, self.row),
            refine=settings,
            report=report,
            on_error=on_error,
            window=window,
            window_tokens=window_tokens,
        )
        for row in rows:
            yield score_of(row.ends, _reading(row), identity)

    def render(self, messages: Sequence[Message], partial: str) -> str:
        """The text the guard reads for a partial response, up to where its own answer begins."""
        return render(self.row, self.tokenizer, messages, partial)

    def p_safe(self, texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """V for rendered texts, one forward each, batched by length: the truth for `score_many`."""
        texts = [encodable(text) for text in texts]
        tokens = self.tokenizer(texts, add_special_tokens=self.row.special_tokens)["input_ids"]
        ids = [[*text, *suffix] for text in tokens for suffix in self.suffixes]
        logits_NK = naive_label_logits(self.model, ids, self.labels, batch_size=batch_size)
        return [float(value) for value in p_safe_of(logits_NK, self.row)]

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]:
        """p_safe of the partial answers of each conversation that end at the given character offsets."""
        ends = iter([ends for _, ends in items])
        rows = trajectories(
            [messages for messages, _ in items],
            self._running(batch_size),
            lambda messages: (self._partials(messages), next(ends)),
            lambda logits_NK: p_safe_of(logits_NK, self.row),
            on_error="keep",
        )
        return [_reading(row) for row in rows]

    def identity(self, chunk: int, unit: Unit, refine: Refine | None = None) -> dict[str, Any]:
        """What made a score: enough to make it again."""
        return {
            "guard": self.name,
            "model": self.model.config._name_or_path,
            "revision": self.revision,
            "row": fingerprint(self.row, self.tokenizer),
            "chunk": chunk,
            "unit": unit,
            "engine": self.scorer[1],
            "refine": None if refine is None else {"tolerance": refine.tolerance, "stride": refine.stride},
        }

    def _partials(self, messages: Sequence[Message]) -> Partials:
        return Partials(
            self.tokenizer,
            lambda partial: self.render(messages, partial),
            messages[-1]["content"],
            endings=self.suffixes,
            special=self.row.special_tokens,
            rule=self.splice,
        )

    def _running(self, batch_size: int) -> Scorer:
        scorer, _ = self.scorer
        if isinstance(scorer, NaiveScorer):
            return scorer.batched(batch_size)
        scorer.forget()
        return scorer


def _reading(row: Trajectory) -> Reading:
    return row.values if row.error is None else Failure(reason=row.error)


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
    config = source.config.get_text_config()
    config.update({key: value for key, value in row.config.items() if config.to_dict().get(key) is None})
    return Guard(
        name=name,
        row=row,
        model=source.to(device).eval(),
        tokenizer=tokenizer,
        labels=labels,
        suffixes=suffixes(row, tokenizer),
        revision=revision,
    )
