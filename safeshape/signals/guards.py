"""Guard models as a signal: the Safety Trajectory Assessment of Response (STAR).

A guard is a row of a table: which tokens mean safe and unsafe, and what stands before them. Every partial response is
rendered with the guard's own chat template and tokenised as a whole; V = exp(l_safe) / (exp(l_safe) + exp(l_unsafe)) on
the raw logits of the label tokens after it. All partial responses of one conversation share one prefill (`prefix.py`);
`Guard.p_safe` is the naive form, one forward per text: the truth that the shared one is tested against.

Shape suffixes: S sequences, K label tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message, answer_of
from safeshape.models import load
from safeshape.signals.chunks import Unit, chunk_ends
from safeshape.signals.guard_rows import GUARDS, GuardRow
from safeshape.signals.partials import Partials, Splice, encodable, splice_rule
from safeshape.signals.prefix import choose_scorer, naive_label_logits
from safeshape.signals.refine import Refine, RefineReport
from safeshape.signals.stream import OnError, Scorer, Trajectory, trajectories
from safeshape.types import Score, Span

# Read once at the start, to see whether a shared prefill gives this model's own logits.
_SAMPLE = (
    "User: what is a fox?\n\nAgent: A fox is a small animal. It lives in the wood, and it is rarely seen by day.\n\n"
)


def p_safe_of(logits_SK: torch.Tensor) -> torch.Tensor:
    """V of each sequence, shape (S,), from the logits of the safe and the unsafe token."""
    return torch.sigmoid(logits_SK[:, 0] - logits_SK[:, 1])


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

    @property
    def label_ids(self) -> tuple[int, ...]:
        """The tokens whose logits are read, safe first."""
        return (self.safe_id, self.unsafe_id)

    @cached_property
    def ending(self) -> tuple[int, ...]:
        """What the guard writes before its label, as tokens of its own, as generation would have it.

        Joined to the text, two newlines after two newlines may become one other token.
        """
        return tuple(self.tokenizer(self.row.answer_prefix, add_special_tokens=False)["input_ids"])

    @cached_property
    def scorer(self) -> tuple[Scorer, str]:
        """What runs the model, chosen by a check at the first use, and why: `shared prefill`, or `naive: ...`."""
        sample = self.tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        return choose_scorer(self.model, self.label_ids, sample)

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
        window: int = 64,
        window_tokens: int = 32768,
    ) -> Iterator[Score]:
        """Score a stream of conversations in order; up to `window` are read ahead and share forwards.

        `refine`: score coarsely, then only where scores move by more than `tolerance` (`refine.py`; give a `Refine` for
        its other settings); `report` then collects what that saved and missed. `on_error`: "stop" raises for the first
        bad row, after all rows before it; "keep" gives it a score of None with its `error` and goes on.
        Errors: ValueError that names the conversation, as `row 3: ...`.
        """
        settings = refine if isinstance(refine, Refine) else Refine(tolerance=tolerance) if refine else None
        identity = self.identity(chunk, unit, settings)
        rows = trajectories(
            conversations,
            self.scorer[0],
            lambda messages: self._prepared(messages, chunk, unit),
            p_safe_of,
            refine=settings,
            report=report,
            on_error=on_error,
            window=window,
            window_tokens=window_tokens,
        )
        for row in rows:
            yield _as_score(row, identity)

    def render(self, messages: Sequence[Message], partial: str) -> str:
        """The text the guard reads for a partial response, up to where its own answer begins."""
        shown = [{"role": m["role"], "content": m["content"]} for m in messages[:-1] if m["role"] != "system"]
        shown.append({"role": "assistant", "content": partial})
        try:
            text = self.tokenizer.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=True, **self.row.template
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the guard's chat template rejects the conversation: {error}") from error
        return str(text)

    def p_safe(self, texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """V for rendered texts, one forward each, batched by length: the truth for `score_many`."""
        rows = self.tokenizer([encodable(text) for text in texts], add_special_tokens=False)["input_ids"]
        ids = [[*row, *self.ending] for row in rows]
        logits_SK = naive_label_logits(self.model, ids, self.label_ids, batch_size=batch_size)
        return [float(value) for value in p_safe_of(logits_SK)]

    def identity(self, chunk: int, unit: Unit, refine: Refine | None = None) -> dict[str, Any]:
        """What made a score: enough to make it again."""
        return {
            "guard": self.name,
            "model": self.model.config._name_or_path,
            "revision": self.revision,
            "chunk": chunk,
            "unit": unit,
            "engine": self.scorer[1],
            "refine": None if refine is None else {"tolerance": refine.tolerance, "stride": refine.stride},
        }

    def _prepared(self, messages: Sequence[Message], chunk: int, unit: Unit) -> tuple[Partials, list[int]]:
        answer = encodable(answer_of({"messages": messages}))
        partials = Partials(
            self.tokenizer,
            lambda partial: self.render(messages, partial),
            answer,
            ending=self.ending,
            rule=self.splice,
        )
        return partials, chunk_ends(answer, chunk, unit, self.tokenizer)


def _as_score(row: Trajectory, identity: dict[str, Any]) -> Score:
    if row.error is not None:
        return Score(signal="star", p_safe=None, scorer=identity, error=row.error)
    starts = [0, *row.ends[:-1]]
    spans = tuple(Span(start=a, end=b, p_safe=v) for a, b, v in zip(starts, row.ends, row.values, strict=True))
    return Score(signal="star", p_safe=spans[-1].p_safe, spans=spans, scorer=identity)


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
