"""The table of guards: how each kind is asked, which tokens are its answer, and how their logits become p_safe.

A chat template comes from the guard's own tokenizer where it has one; a row carries one only where the model has none,
or where its own would write today's date into the prompt. What a guard writes before its label is appended as tokens
of its own, as generation would have it: joined to the text, two newlines after two newlines may become one token.
Facts come from the model cards and the released evaluation code; no large guard was run to make this table.

Shape suffixes: S partial answers, R reads per partial answer, N = S * R sequences, K label tokens.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from itertools import product
from string import Template
from typing import Annotated, Any, Literal

import torch
from jinja2.exceptions import TemplateError
from pydantic import BeforeValidator, ValidationError
from pydantic.dataclasses import dataclass
from transformers import PreTrainedTokenizerBase

from safeshape.config.parser import STRICT, first_problem, read_yaml
from safeshape.data import Message
from safeshape.signals.guard_texts import (
    GPT_OSS,
    GPT_OSS_POLICY,
    GRANITE_4_1,
    HARM,
    PLAIN_ANSWER,
    SHIELD_GUIDELINE,
    WILDGUARD,
)
from safeshape.signals.plain_text import as_plain
from safeshape.signals.sharpen import Sharpen, sharpened


def _labels(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, list | tuple) else value
    if isinstance(found, bool) or (isinstance(found, tuple) and any(isinstance(item, bool) for item in found)):
        raise ValueError("write labels in quotes, YAML reads yes and no as truth values")
    return found


def _sharpening(value: object) -> object:
    return Sharpen() if value is True else None if value is False else value


Labels = Annotated[tuple[str, ...], BeforeValidator(_labels)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardRow:
    """How one kind of guard is asked and read.

    `kind`: "labels" (label tokens of a causal language model), "classifier" (a sequence classifier's classes) or
    "stream" (a risk level for every token). `safe`, `unsafe`, `controversial`: the labels of each class; several are
    added up. `controversial_weight`: how much of the controversial class counts as safe, from 0 (strict: it is unsafe)
    to 1 (loose: it is safe). `first_token`: read labels of several tokens at their first.
    `answer_prefix`: what the guard writes before its label (Llama Guard 3: two newlines). `anchor`: text right before
    the guard's answer, where the tokens of an answer depend on it. `asks`: questions that the guard answers, with the
    same labels, before the one that is read; their answers are summed out.
    `chat_template`: used in place of the tokenizer's. `template`: extra arguments of the chat template. `closing`: a
    user message after the conversation, with $name for entries of `template`. `parts`: message content is a list of
    parts. `open_turn`: the text ends with the partial answer, without an end of turn. `special_tokens`: the tokenizer
    adds its own. `one_pass`: a causal classifier reads every partial answer off one forward of the whole one.
    `debounce`, `monotone`: see `safeshape.signals.streams`. `sharpen`: True for the released code's near-hard scores.
    `model`: default weights. `config`: entries of the model's configuration to fill in where it leaves them empty.
    """

    kind: Literal["labels", "classifier", "stream"] = "labels"
    safe: Labels = ("safe",)
    unsafe: Labels = ("unsafe",)
    controversial: Labels = ()
    controversial_weight: float = 0.5
    first_token: bool = False
    answer_prefix: str = ""
    anchor: str = ""
    asks: Labels = ()
    chat_template: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    closing: str | None = None
    parts: bool = False
    open_turn: bool = False
    special_tokens: bool = False
    one_pass: bool = False
    debounce: int = 1
    monotone: bool = False
    sharpen: Annotated[Sharpen | None, BeforeValidator(_sharpening)] = None
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.controversial_weight <= 1.0:
            raise ValueError(f"controversial_weight must be in [0, 1], got {self.controversial_weight}")
        if not self.unsafe or not (self.safe or (self.kind == "classifier" and len(self.labels) == 1)):
            raise ValueError("safe and unsafe each need a label; only a classifier with one unsafe class needs no safe")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"the labels must differ, got {', '.join(self.labels)}")
        if self.asks and (self.controversial or self.kind != "labels"):
            raise ValueError("asks is for guards with label tokens and without a controversial class")
        if self.debounce < 1:
            raise ValueError(f"debounce must be at least 1, got {self.debounce}")
        if self.kind != "stream" and (self.monotone or self.debounce > 1):
            raise ValueError(f"debounce and monotone are for kind stream, and this row's kind is {self.kind}")
        if self.kind != "classifier" and self.one_pass:
            raise ValueError(f"one_pass is for kind classifier, and this row's kind is {self.kind}")
        if self.kind != "labels" and (self.answer_prefix or self.sharpen or self.config):
            raise ValueError(f"answer_prefix, sharpen and config are for kind labels, not for {self.kind}")

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order in which their logits are given: safe, unsafe, controversial."""
        return (*self.safe, *self.unsafe, *self.controversial)


def shown(row: GuardRow, messages: Sequence[Message], partial: str) -> list[dict[str, Any]]:
    """The messages a guard is shown for a partial answer. The system prompt is not among them.

    Errors: ValueError when `closing` names something that `template` lacks.
    """
    turns = [(m["role"], m["content"]) for m in messages[:-1] if m["role"] != "system"]
    turns.append(("assistant", partial))
    if row.closing is not None:
        try:
            turns.append(("user", Template(row.closing).substitute(row.template)))
        except KeyError as error:
            raise ValueError(f"the guard row's closing names ${error.args[0]}, which its template lacks") from error
    return [{"role": role, "content": [{"type": "text", "text": t}] if row.parts else t} for role, t in turns]


def render(row: GuardRow, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], partial: str) -> str:
    """The text the guard reads for a partial answer, up to where its own answer begins.

    `messages`: the conversation; its last message gives way to `partial`. Special tokens in them are plain text.
    Errors: ValueError when the chat template rejects the conversation.
    """
    options: dict[str, Any] = {"add_generation_prompt": not row.open_turn, "continue_final_message": row.open_turn}
    if row.chat_template is not None:
        options["chat_template"] = row.chat_template
    options |= row.template
    try:
        plain = shown(row, *_as_plain(messages, partial, tokenizer))
        return str(tokenizer.apply_chat_template(plain, tokenize=False, **options))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the guard's chat template rejects the conversation: {error}") from error


def _as_plain(
    messages: Sequence[Message], partial: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Message], str]:
    """All texts without special tokens; a partial answer has the letters of the whole, also where it cuts a token."""
    plain = [
        {**message, "content": as_plain(message["content"], tokenizer)}
        if isinstance(message.get("content"), str) else message
        for message in messages
    ]  # fmt: skip
    whole = messages[-1].get("content") if messages else None
    if isinstance(whole, str) and whole.startswith(partial):
        return plain, plain[-1]["content"][: len(partial)]
    return plain, as_plain(partial, tokenizer)


def reads(row: GuardRow) -> list[tuple[int, ...]]:
    """The answers (0 safe, 1 unsafe) given to `asks` before each read: none, then one, ...; R of them, in order."""
    return [path for depth in range(len(row.asks) + 1) for path in product((0, 1), repeat=depth)]


def _answer_text(row: GuardRow, path: tuple[int, ...]) -> str:
    done = "".join(ask + (row.safe, row.unsafe)[given][0] for ask, given in zip(row.asks, path, strict=False))
    return done + (row.asks[len(path)] if len(path) < len(row.asks) else row.answer_prefix)


def _after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int] | None:
    """The tokens of `text` where it follows `before`, or None when the two melt together."""
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    return list(ids[len(head) :]) if ids[: len(head)] == head else None


def suffixes(row: GuardRow, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """The tokens to append to a rendered text for each of the R reads, in the order of `reads`.

    Errors: ValueError when the answer's tokens melt into the row's anchor.
    """
    found = []
    for path in reads(row):
        text = _answer_text(row, path)
        ids = _after(tokenizer, row.anchor, text)
        if ids is None:
            raise ValueError(f"the guard's answer {text!r} melts into the text before it, {row.anchor!r}")
        found.append(tuple(ids))
    return tuple(found)


def label_ids(row: GuardRow, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token of each label, in the order of `GuardRow.labels`, as it follows the guard's answer prefix.

    Errors: ValueError for a label that is not in the vocabulary, is several tokens (unless `first_token`), melts into
    the text before it, or shares its token with another.
    """
    by_label: dict[str, int] = {}
    for path, label in product(reads(row), row.labels):
        ids = _after(tokenizer, row.anchor + _answer_text(row, path), label)
        if not ids:
            raise ValueError(f"guard label {label!r} melts into the text before it, {_answer_text(row, path)!r}")
        if tokenizer.decode(ids).strip().casefold() != label.strip().casefold():
            raise ValueError(f"guard label {label!r} is not in this guard's vocabulary")
        if len(ids) > 1 and not row.first_token:
            raise ValueError(
                f"guard label {label!r} is {len(ids)} tokens for this guard's tokenizer; it must be exactly one, or "
                "set first_token"
            )
        if by_label.setdefault(label, ids[0]) != ids[0]:
            raise ValueError(f"guard label {label!r} is another token after {_answer_text(row, path)!r}")
    for label, other in product(row.labels, row.labels):
        if label < other and by_label[label] == by_label[other]:
            raise ValueError(f"guard labels {label!r} and {other!r} begin with the same token")
    return tuple(by_label[label] for label in row.labels)


def class_share(logits_NK: torch.Tensor, row: GuardRow, seen_NK: torch.Tensor | None = None) -> torch.Tensor:
    """The probability of the safe labels (N,) among all labels; a controversial one counts by its weight."""
    logits_NK = sharpened(logits_NK, row.sharpen, seen_NK) if row.sharpen else logits_NK.float()
    share_NK = logits_NK.softmax(-1)
    safe, unsafe = len(row.safe), len(row.safe) + len(row.unsafe)
    return share_NK[:, :safe].sum(-1) + row.controversial_weight * share_NK[:, unsafe:].sum(-1)


def p_safe_of(logits_NK: torch.Tensor, row: GuardRow, seen_NK: torch.Tensor | None = None) -> torch.Tensor:
    """p_safe (S,) from the label logits of S partial answers with R reads each, those of one answer side by side.

    For two labels this is exp(l_safe) / (exp(l_safe) + exp(l_unsafe)), eq. 2 of STAR-DSS (arXiv 2505.17196). With
    `asks`, the guard's earlier answers are summed out: sum over paths of P(path) * P(safe | path).
    """
    paths = reads(row)
    share_SR = class_share(logits_NK, row, seen_NK).view(-1, len(paths))
    chance: dict[tuple[int, ...], torch.Tensor] = {(): torch.ones_like(share_SR[:, 0])}
    p_safe_S = torch.zeros_like(share_SR[:, 0])
    for index, path in enumerate(paths):
        if len(path) == len(row.asks):
            p_safe_S = p_safe_S + chance[path] * share_SR[:, index]
        else:
            chance[(*path, 0)] = chance[path] * share_SR[:, index]
            chance[(*path, 1)] = chance[path] * (1 - share_SR[:, index])
    return p_safe_S


def row_of(row: str | Mapping[str, Any]) -> tuple[str, GuardRow]:
    """A row and its name: from the table, from a YAML file, or from a mapping of fields.

    A mapping may also hold `name`, and `base`: a row of the table whose fields it replaces (entries of `template` one
    by one). Errors: ValueError in one sentence that names the row, the file or the field.
    """
    if isinstance(row, str):
        if row in GUARDS:
            return row, GUARDS[row]
        if not row.endswith((".yaml", ".yml")):
            raise ValueError(f"unknown guard {row!r}; known: {', '.join(GUARDS)}, a YAML file, or a row of your own")
        return row_of({"name": row, **read_yaml(row)})
    known = [f.name for f in fields(GuardRow)]
    for key in row:
        if key not in (*known, "name", "base"):
            raise ValueError(f"a guard row has no field {key!r}; it has: name, base, {', '.join(sorted(known))}")
    name, base = row.get("name", "own"), row.get("base")
    given = {key: value for key, value in row.items() if key not in ("name", "base")}
    if not isinstance(name, str):
        raise ValueError(f"a guard row's name must be text, got {name!r}")
    if base is not None and base not in GUARDS:
        raise ValueError(f"unknown guard {base!r} as base; known: {', '.join(GUARDS)}")
    if base is not None and isinstance(given.get("template"), Mapping):
        given["template"] = {**GUARDS[base].template, **given["template"]}
    try:
        return name, GuardRow(**given) if base is None else replace(GUARDS[base], **given)
    except ValidationError as error:
        raise ValueError(f"guard {name!r}: {first_problem(error)}") from error


def fingerprint(row: GuardRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how the guard is asked and read, apart from its weights."""
    how = {key: value for key, value in asdict(row).items() if key != "model"}
    how["chat_template"] = row.chat_template if row.chat_template is not None else tokenizer.chat_template
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]


# Below: model ids, licence, whether the Hub asks for consent ("gated"), and what is read where.
_LLAMA_GUARD = GuardRow(answer_prefix="\n\n", model="meta-llama/Llama-Guard-3-8B")
_GRANITE = GuardRow(safe=("No",), unsafe=("Yes",), template={"guardian_config": {"risk_name": "harm"}})

GUARDS: dict[str, GuardRow] = {
    # The embedded world's guard; Apache-2.0; the first token it writes.
    "world": GuardRow(),
    # Llama 3.1 licence, gated. "\n\n" then safe/unsafe, the second token it writes. Differs: see `Guard.score`.
    "llama-guard-3": _LLAMA_GUARD,
    # Llama 3.2 licence, gated. As above, with content as a list of parts.
    "llama-guard-3-1b": replace(_LLAMA_GUARD, parts=True, model="meta-llama/Llama-Guard-3-1B"),
    # Llama 4 licence, gated. Text only. That it writes "\n\n" first, as Llama Guard 3 does, was not verified here. Its
    # configuration leaves attention_chunk_size empty, without which it does not run; its users set 8192.
    "llama-guard-4": replace(
        _LLAMA_GUARD, parts=True, config={"attention_chunk_size": 8192}, model="meta-llama/Llama-Guard-4-12B"
    ),
    # 3.0, 3.1 and 3.2; Apache-2.0, open. Yes/No, the first token; 3.2 writes a confidence after it, which is not read.
    "granite-guardian-3": replace(_GRANITE, model="ibm-granite/granite-guardian-3.1-2b"),
    # Apache-2.0, open. <score> yes </score>. Differs: "<score>" is given instead of sampled; without thinking.
    "granite-guardian-3.3": replace(
        _GRANITE,
        safe=(" no",),
        unsafe=(" yes",),
        answer_prefix="<score>",
        template={"guardian_config": {"criteria_id": "harm"}, "think": False},
        model="ibm-granite/granite-guardian-3.3-8b",
    ),
    # Apache-2.0, open. The criterion is a last user message. Differs: the empty thinking block that it writes when
    # told not to think, and "<score>", are given; the criterion is in our own words (`template: {criteria: ...}`).
    "granite-guardian-4.1": GuardRow(
        safe=(" no",),
        unsafe=(" yes",),
        answer_prefix="<think>\n</think>\n<score>",
        closing=GRANITE_4_1,
        template={"criteria": HARM},
        model="ibm-granite/granite-guardian-4.1-8b",
    ),
    # Gemma terms, gated. Yes/No right after the prompt, as on the card. Differs: one guideline in our own words for all
    # harms, where the card asks about one policy at a time (`template: {guideline: ...}`).
    "shieldgemma": GuardRow(
        safe=("No",),
        unsafe=("Yes",),
        template={"guideline": SHIELD_GUIDELINE, "add_generation_prompt": False},
        model="google/shieldgemma-2b",
    ),
    # Apache-2.0, gated by a form. It answers three questions; the third, "Harmful response:", is read. Differs: its
    # first two answers are summed out (seven reads) where the released code samples one path.
    "wildguard": GuardRow(
        safe=(" no",),
        unsafe=(" yes",),
        anchor="\n",
        asks=("Harmful request:", "\nResponse refusal:"),
        answer_prefix="\nHarmful response:",
        chat_template=WILDGUARD,
        model="allenai/wildguard",
    ),
    # Apache-2.0, open. "Safety: Safe", at the label's first token. The released evaluation's strict and loose modes are
    # controversial_weight 0 and 1.
    "qwen3guard-gen": GuardRow(
        safe=(" Safe",),
        unsafe=(" Unsafe",),
        controversial=(" Controversial",),
        first_token=True,
        answer_prefix="Safety:",
        template={"add_generation_prompt": False},
        model="Qwen/Qwen3Guard-Gen-0.6B",
    ),
    # Apache-2.0, open. A risk level for every token of the answer, from heads of its own; one pass.
    "qwen3guard-stream": GuardRow(
        kind="stream",
        safe=("Safe",),
        unsafe=("Unsafe",),
        controversial=("Controversial",),
        open_turn=True,
        template={"enable_thinking": False},
        model="Qwen/Qwen3Guard-Stream-0.6B",
    ),
    # Apache-2.0, open. 0/1 in the final channel. Differs: it is given an empty analysis instead of reasoning, since a
    # score is one forward; the policy is ours (`template: {policy: ...}`); no date in the prompt.
    "gpt-oss-safeguard": GuardRow(
        safe=("0",),
        unsafe=("1",),
        chat_template=GPT_OSS,
        template={"policy": GPT_OSS_POLICY, "reasoning_effort": "low"},
        answer_prefix="<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        model="openai/gpt-oss-safeguard-20b",
    ),
    # Any sequence classifier, one forward per partial answer, which it reads alone. Labels are names of its classes.
    "classifier": GuardRow(kind="classifier", chat_template=PLAIN_ANSWER, special_tokens=True),
    # A causal classifier with a chat template: every partial answer from one forward.
    "causal-classifier": GuardRow(kind="classifier", open_turn=True, one_pass=True),
}
