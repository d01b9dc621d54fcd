"""Rows in; tokens, labels and character offsets out; and the collator that carries token scores beside them.

A row is `messages` (a conversation), or `prompt` and `completion` (two strings, or two lists of messages).
Shape suffixes: B rows, L tokens of the padded batch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_convert_to_chatml
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from safeshape.types import IGNORE, MicroBatch

Message = Mapping[str, Any]
_SENTINEL = "\ue000answer\ue001"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One assistant turn inside the rendered text; all numbers are character offsets, ends exclusive.

    `start`, `end`: what the model has to produce, end-of-turn marker included. `answer_start`: where the answer's own
    text begins; `stripped`: how many leading characters the chat template removed from it; `answer`: the text as the
    row gives it. `p_safe`: the score a message carries itself. `last`: whether the row's `safety` is about this turn.
    """

    start: int
    end: int
    answer_start: int
    stripped: int
    answer: str
    p_safe: float | None
    last: bool


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text to train on and its assistant turns. `special`: whether the tokenizer adds its own tokens."""

    text: str
    turns: tuple[Turn, ...]
    special: bool


def conversation(row: Mapping[str, Any]) -> list[Message] | None:
    """The messages of a row, or None for a row of two plain strings.

    Errors: ValueError, without the row's number, when the row is neither form.
    """
    row = maybe_convert_to_chatml(dict(row))
    if row.get("messages") is not None:
        return _checked(row["messages"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return None
    if isinstance(prompt, Sequence) and isinstance(completion, Sequence) and not isinstance(prompt, str | bytes):
        return _checked([*prompt, *completion])
    raise ValueError(
        f"needs `messages`, or `prompt` and `completion` of the same form; it has: {', '.join(map(str, row))}"
    )


def _checked(messages: Sequence[Message]) -> list[Message]:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {index} needs a role and content")
    return list(messages)


def json_lines(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a JSONL file with the object in it; blank lines are passed over.

    Errors: ValueError that names the file and the line.
    """
    with Path(name).open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}: line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{name}: line {number} is not a JSON object")
            yield line, row


def answer_of(row: Mapping[str, Any]) -> str:
    """The last assistant message of a row: the text that signals score and spans refer to.

    Errors: ValueError when it is missing, empty or not the last message.
    """
    messages = conversation(row)
    if messages is None:
        answer = row["completion"]
    else:
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("the last message must be the assistant's")
        answer = messages[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("the assistant's answer is empty or not a string")
    return answer


def as_messages(row: Mapping[str, Any]) -> list[Message]:
    """The row as a conversation; two plain strings become a user and an assistant message."""
    messages = conversation(row)
    if messages is None:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return messages


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except TemplateError as error:
        raise ValueError(f"the chat template rejects the conversation: {error}") from error


def _with_sentinel(messages: Sequence[Message], index: int) -> list[Message]:
    return [{**m, "content": _SENTINEL} if i == index else m for i, m in enumerate(messages)]


def _chat_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, text: str) -> Turn:
    answer = messages[index]["content"]
    last = index == len(messages) - 1
    marked = _template(tokenizer, _with_sentinel(messages, index))
    answer_start = marked.find(_SENTINEL)
    for shown in (answer, answer.strip()):
        if answer_start >= 0 and text.startswith(shown, answer_start):
            break
    else:
        raise ValueError("the chat template rewrites the answer, so its characters cannot be found in the text")
    head = _template(tokenizer, messages[:index], add_generation_prompt=True) if index else ""
    if last:
        end = len(text)
    else:
        tail = _template(tokenizer, _with_sentinel(messages[: index + 1], index)).partition(_SENTINEL)[2]
        end = answer_start + len(shown)
        end += len(tail) if text.startswith(tail, end) else 0
    p_safe = messages[index].get("p_safe")
    return Turn(
        start=len(head) if head and text.startswith(head) and len(head) <= answer_start else answer_start,
        end=end,
        answer_start=answer_start,
        stripped=answer.find(shown),
        answer=answer,
        p_safe=None if p_safe is None or last else checked_p_safe(p_safe, "p_safe of an earlier message"),
        last=last,
    )


def render(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render a row and find its assistant turns: the last, and earlier ones that carry a `p_safe` of their own.

    Errors: ValueError in one sentence, without the row's number.
    """
    answer = answer_of(row)
    messages = conversation(row)
    if messages is None:
        prompt, eos = row["prompt"], tokenizer.eos_token or ""
        text = prompt + answer + ("" if answer.endswith(eos) else eos)
        turn = Turn(
            start=len(prompt),
            end=len(text),
            answer_start=len(prompt),
            stripped=0,
            answer=answer,
            p_safe=None,
            last=True,
        )
        return Rendered(text=text, turns=(turn,), special=True)
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; give `prompt` and `completion` as strings instead")
    text = _template(tokenizer, messages)
    wanted = [i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant" and m.get("p_safe") is not None]
    turns = tuple(_chat_turn(tokenizer, messages, index, text) for index in (*wanted, len(messages) - 1))
    return Rendered(text=text, turns=turns, special=False)


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their character offsets in the rendered text.

    Errors: ValueError for a tokenizer that cannot tell offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    encoded = tokenizer(rendered.text, add_special_tokens=rendered.special, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def checked_p_safe(value: object, name: str) -> float:
    """The value as a probability. Errors: ValueError that names the field for NaN and anything outside [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


class ShapedCollator:
    """TRL's collator, with the scores (and places in the reference store) padded or flattened beside the labels."""

    def __init__(self, collator: DataCollatorForLanguageModeling) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        for name, (filler, dtype) in _BESIDE_LABELS.items():
            if name in rows[0]:
                values = [torch.tensor(row[name], dtype=dtype) for row in rows]
                if self.collator.padding_free:
                    values = [torch.cat(values)]
                batch[name] = pad(values, padding_value=filler, pad_to_multiple_of=self.collator.pad_to_multiple_of)
        return batch


# Columns with one value per token: what fills the padding, and their type.
_BESIDE_LABELS = {
    "p_safe": (0, torch.float32),
    "answer_p_safe": (0, torch.float32),
    "cache_index": (-1, torch.int64),
    "row_index": (-1, torch.int64),
}


def example_risk(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Risk 1 - p_safe of each example, shape (examples,): the mean over its response tokens.

    An example is a row, or where rows are packed or flattened, a stretch of a row whose positions count from 0.
    """
    labels_BL, risk_BL = batch["labels"], 1 - batch["answer_p_safe"]
    example_M = _begins(batch).flatten().cumsum(0) - 1
    counted_M = (labels_BL != IGNORE).flatten()
    zeros = risk_BL.new_zeros(int(example_M[-1]) + 1)
    total = zeros.index_add(0, example_M, risk_BL.flatten() * counted_M)
    tokens = zeros.index_add(0, example_M, counted_M.to(zeros))
    return (total / tokens.clamp(min=1))[tokens > 0]


def _begins(batch: Mapping[str, Any]) -> torch.Tensor:
    begins_BL: torch.Tensor = batch.get("position_ids", torch.ones_like(batch["labels"])) == 0
    begins_BL[:, 0] = True
    return begins_BL


def micro_batch(inputs: Mapping[str, Any]) -> MicroBatch:
    """A collated batch as the trainer's step reads it: labels and scores shifted to the position that predicts them."""
    labels_BT = inputs["labels"][:, 1:]
    counted_BT = labels_BT != IGNORE
    index_BT = inputs["cache_index"][:, 1:] if "cache_index" in inputs else None
    return MicroBatch(
        forward={name: value for name, value in inputs.items() if name != "labels" and name not in _BESIDE_LABELS},
        labels_BT=labels_BT,
        counted_BT=counted_BT,
        p_safe_BT=inputs["p_safe"][:, 1:],
        answer_p_safe_BT=inputs["answer_p_safe"][:, 1:],
        position_BT=response_position(labels_BT),
        cache_index_N=None if index_BT is None else index_BT[counted_BT],
        begins_BL=_begins(inputs),
    )


def tokens_seen(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens of a collated batch are no padding, as TRL counts them."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    return batch["position_ids"].new_tensor(batch["position_ids"].numel())


def last_turns(batch: Mapping[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """(row, begin, end) of the last turn of each example of a collated batch that has response tokens."""
    return [(row, end, last) for row, _, end, last in prompt_spans(batch["labels"], _begins(batch))]


def prompt_ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before a row's last answer, as they stand in the row that is trained on.

    Errors: ValueError as in `render`.
    """
    rendered = render(row, tokenizer)
    ids, offsets = encode(rendered, tokenizer)
    begin = rendered.turns[-1].start
    return ids[: next(index for index, (start, end) in enumerate(offsets) if start >= begin and end > start)]


def prompt_spans(labels_BL: torch.Tensor, begins_BL: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """(row, begin, end, last) of each example with a response: its prompt is [begin, end), its last turn [end, last).

    `begins_BL`: where an example starts. What stands before the last turn is its prompt, earlier turns included.
    """
    spans = []
    counted_BL, begins = (labels_BL != IGNORE).cpu(), begins_BL.clone().cpu()
    begins[:, 0] = True
    for row in range(len(counted_BL)):
        edges = [*begins[row].nonzero()[:, 0].tolist(), counted_BL.shape[1]]
        for begin, stop in pairwise(edges):
            counted = counted_BL[row, begin:stop].nonzero()[:, 0]
            if len(counted):
                gaps = (counted.diff() > 1).nonzero()[:, 0]
                first = int(counted[int(gaps[-1]) + 1]) if len(gaps) else int(counted[0])
                spans.append((row, begin, begin + first, begin + int(counted[-1]) + 1))
    return spans


def response_position(labels_BT: torch.Tensor) -> torch.Tensor:
    """1 for the first response token of each turn, 2 for the next, ...; 0 where no label counts."""
    counted_BT = labels_BT != IGNORE
    running_BT = counted_BT.cumsum(-1)
    before_BT = torch.where(counted_BT, 0, running_BT).cummax(-1).values
    return (running_BT - before_BT) * counted_BT
