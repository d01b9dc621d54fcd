"""Sequence classifiers as guards: one forward per partial answer, or one for all of them where the model is causal.

A causal classifier's head looks at the last token only and can be applied to every token: the score of a partial
answer then stands at its last token in the forward of the whole answer. That holds where the tokens of the partial
text begin the tokens of the whole one; a partial text with other tokens (an end of turn after it, a merge across the
cut) gets a forward of its own. Batching never changes a score: padding is on the right and masked.

Shape suffixes: N sequences, L tokens of the padded batch, P positions read in a sequence, K classes, H hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification

from safeshape.data import Message
from safeshape.signals.chunks import Unit
from safeshape.signals.guard_rows import GuardRow, class_share, fingerprint, render
from safeshape.signals.reading import Failure, Item, Reading, Scoring


def class_ids(row: GuardRow, names: Mapping[int, str]) -> tuple[int, ...]:
    """The class of each label of a row, in the order of its labels. `names`: the model's `id2label`.

    Errors: ValueError that names the label and lists the classes there are.
    """
    by_name = {name: index for index, name in names.items()}
    for label in row.labels:
        if label not in by_name:
            raise ValueError(f"the classifier has no class {label!r}; it has: {', '.join(map(str, by_name))}")
    return tuple(by_name[label] for label in row.labels)


def _padded(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    pad = model.config.get_text_config().pad_token_id
    ids_NL = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=pad or 0)
    lengths_N = torch.tensor([len(ids) for ids in sequences])
    mask_NL = (torch.arange(ids_NL.shape[1]) < lengths_N[:, None]).long()
    return {"input_ids": ids_NL.to(model.device), "attention_mask": mask_NL.to(model.device)}


def _by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def pooled_logits(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], classes: Sequence[int], *, batch_size: int = 64
) -> torch.Tensor:
    """The class logits (N, K) in float32, as the classifier itself pools them. A model without a padding token is
    run one sequence at a time."""
    if model.config.get_text_config().pad_token_id is None:
        batch_size = 1
    found_NK = torch.zeros(len(sequences), len(classes))
    with torch.inference_mode():
        for rows in _by_length(sequences, batch_size):
            logits = model(**_padded(model, [sequences[row] for row in rows])).logits
            found_NK[rows] = logits[:, list(classes)].float().cpu()
    return found_NK


def logits_at(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    classes: Sequence[int],
    *,
    batch_size: int = 64,
) -> list[torch.Tensor]:
    """The class logits (P, K) that a causal classifier's head gives at some tokens of each sequence."""
    found = [torch.zeros(0)] * len(sequences)
    with torch.inference_mode():
        for rows in _by_length(sequences, batch_size):
            hidden_NLH = model.base_model(**_padded(model, [sequences[r] for r in rows]), use_cache=False)[0]
            for row, hidden_LH in zip(rows, hidden_NLH, strict=True):
                found[row] = model.score(hidden_LH[list(positions[row])])[:, list(classes)].float().cpu()
    return found


def refuse_other_than_causal(model: PreTrainedModel, name: str) -> None:
    """Check, by trying, that a token's score does not depend on later tokens. Errors: ValueError if it does, or if the
    model's head cannot be applied to a token."""
    if not isinstance(model, GenericForSequenceClassification):
        raise ValueError(f"guard {name!r}: one_pass needs a causal classifier, and {type(model).__name__} is not one")
    last = range(min(4, model.config.get_text_config().vocab_size))
    seen_NPK = torch.stack(logits_at(model, [[0, 1, 0, 1, token] for token in last], [[0, 1, 2, 3]] * len(last), [0]))
    if not torch.allclose(seen_NPK, seen_NPK[:1], rtol=1e-3, atol=1e-3):
        raise ValueError(f"guard {name!r}: one_pass needs a causal classifier, and this one looks at later tokens")


@dataclass(frozen=True, kw_only=True)
class Classifier(Scoring):
    """A loaded sequence classifier that scores partial answers. `classes`: the class of each label of the row."""

    name: str
    row: GuardRow
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    classes: tuple[int, ...]
    revision: str

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]:
        """p_safe of the partial answers that end at the given offsets, or why a conversation has none."""
        tokens = [[self._tokens(messages, messages[-1]["content"][:end]) for end in ends] for messages, ends in items]
        readings: list[Reading] = [self._too_long(sequences) or [] for sequences in tokens]
        readable = [index for index, reading in enumerate(readings) if not isinstance(reading, Failure)]
        logits = self._logits([tokens[index] for index in readable], batch_size)
        for index, logits_PK in zip(readable, logits, strict=True):
            p_safe_P = class_share(logits_PK, self.row) if self.row.safe else torch.sigmoid(-logits_PK[:, 0])
            readings[index] = p_safe_P.tolist()
        return readings

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

    def _tokens(self, messages: Sequence[Message], partial: str) -> list[int]:
        text = render(self.row, self.tokenizer, messages, partial)
        return list(self.tokenizer(text, add_special_tokens=self.row.special_tokens)["input_ids"])

    def _too_long(self, sequences: Sequence[Sequence[int]]) -> Failure | None:
        longest = max(len(ids) for ids in sequences)
        limit = self.model.config.get_text_config().to_dict().get("max_position_embeddings")
        limit = min(limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        return Failure(reason=f"has {longest} tokens, but the guard reads {limit}") if longest > limit else None

    def _logits(self, tokens: Sequence[Sequence[list[int]]], batch_size: int) -> list[torch.Tensor]:
        """The class logits (P, K) of each conversation's P partial texts."""
        if not tokens:
            return []
        if not self.row.one_pass:
            flat = [ids for sequences in tokens for ids in sequences]
            pooled_NK = pooled_logits(self.model, flat, self.classes, batch_size=batch_size)
            return list(torch.split(pooled_NK, [len(sequences) for sequences in tokens]))
        wanted: dict[tuple[int, ...], list[int]] = {}
        places = []
        for sequences in tokens:
            whole = sequences[-1]
            for ids in sequences:
                host = tuple(whole if whole[: len(ids)] == ids else ids)
                at = wanted.setdefault(host, [])
                places.append((host, len(at)))
                at.append(len(ids) - 1)
        rows = logits_at(self.model, list(wanted), list(wanted.values()), self.classes, batch_size=batch_size)
        found = dict(zip(wanted, rows, strict=True))
        flat_PK = torch.stack([found[host][at] for host, at in places])
        return list(torch.split(flat_PK, [len(sequences) for sequences in tokens]))


def load_classifier(
    name: str,
    row: GuardRow,
    source: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str,
    dtype: str,
    device: str,
) -> Classifier:
    """Load a sequence classifier as a guard. Errors: ValueError for classes it lacks, or `one_pass` where it errs."""
    if isinstance(source, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, revision=revision)
        source = AutoModelForSequenceClassification.from_pretrained(source, revision=revision, dtype=dtype)
    if tokenizer is None:
        raise ValueError("a loaded guard model needs its tokenizer")
    model = source.to(device).eval()
    if row.one_pass:
        refuse_other_than_causal(model, name)
    classes = class_ids(row, model.config.id2label)
    return Classifier(name=name, row=row, model=model, tokenizer=tokenizer, classes=classes, revision=revision)
