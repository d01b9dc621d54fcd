"""Stream guards: a causal model whose heads give every token of an answer a risk level, in one forward.

Qwen3Guard-Stream is a Qwen3 body; a projection, an RMS norm and a linear head turn each token's last hidden state into
three risk levels (a second pair judges the user's prompt and a category head names the harm: not read here). The class
below has the checkpoint's parameter names, so its weights load without running code from the Hub.

The model was trained on monotone labels: after the first unsafe token every later one is unsafe, so that an answer
which turns safe again stays low, unlike with a guard that reads the whole text anew. Two knobs of a row make that a
rule of the score: `debounce=n` lets a token count as risky only as far as the n tokens up to it all are, and `monotone`
lets p_safe only fall. The released evaluation calls an answer unsafe at two unsafe tokens in a row: debounce 2.

Shape suffixes: B conversations, L tokens of the padded batch, T tokens of an answer, K risk levels, H hidden.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from safeshape.data import Message, Rendered, encode
from safeshape.signals.chunks import Unit
from safeshape.signals.guard_rows import GuardRow, class_share, fingerprint, render
from safeshape.signals.plain_text import as_plain
from safeshape.signals.reading import Failure, Item, Reading, Scoring


def smoothed(p_safe_T: torch.Tensor, *, debounce: int, monotone: bool) -> torch.Tensor:
    """p_safe of an answer's tokens (T,) after debouncing and, if asked, never rising again.

    A token's p_safe becomes the highest of the `debounce` tokens up to it (fewer at the start).
    """
    padded_T = nn.functional.pad(p_safe_T, (debounce - 1, 0), value=-1.0)
    kept_T = padded_T.unfold(0, debounce, 1).amax(-1)
    return kept_T.cummin(0).values if monotone else kept_T


def answer_place(text: str, answer: str) -> tuple[int, int]:
    """Where an answer at the end of a rendered text begins in it, and how many characters the template stripped there.

    Errors: ValueError when the template rewrites the answer.
    """
    for kept in (answer, answer.rstrip(), answer.strip()):
        if text.endswith(kept):
            return len(text) - len(kept), answer.index(kept)
    raise ValueError("the guard's chat template rewrites the answer, so its characters cannot be found in the text")


def tokens_at(offsets: Sequence[tuple[int, int]], start: int, ends: Sequence[int]) -> tuple[int, list[int]]:
    """The first token of an answer that begins at character `start`, and the token that holds the last character
    before each end. Offsets and ends are into the same text; a token that reaches across an end is the one read."""
    first = next(index for index, (_, end) in enumerate(offsets) if end > start)
    places = [index for index, (begin, end) in enumerate(offsets) if end > begin]
    begins = [offsets[place][0] for place in places]
    return first, [max(places[bisect_left(begins, end) - 1], first) for end in ends]


class TokenRiskModel(PreTrainedModel):  # type: ignore[misc]
    """The body and the response heads of Qwen3Guard-Stream: token ids to risk logits (B, L, K)."""

    config_class = Qwen3Config
    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.", r"^query_", r"^category_head\.")

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.model = Qwen3Model(config)
        inner = config.guard_inner_size
        self.risk_level_category_pre = nn.Linear(config.hidden_size, inner, bias=False)
        self.risk_level_category_layernorm = nn.RMSNorm(inner, eps=config.rms_norm_eps)
        self.risk_level_head = nn.Linear(inner, config.num_risk_level, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_BLH = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        inner_BLH = self.risk_level_category_layernorm(self.risk_level_category_pre(hidden_BLH))
        logits_BLK: torch.Tensor = self.risk_level_head(inner_BLH)
        return logits_BLK


@dataclass(frozen=True, kw_only=True)
class StreamGuard(Scoring):
    """A loaded stream guard: p_safe at the last token of each chunk. `levels`: the risk level of each label of the row.

    Differs: other guards read each partial answer as if it ended there; this one reads tokens of the whole answer.
    """

    name: str
    row: GuardRow
    model: TokenRiskModel
    tokenizer: PreTrainedTokenizerBase
    levels: tuple[int, ...]
    revision: str

    def p_safe_at(self, items: Sequence[Item], *, batch_size: int = 64) -> list[Reading]:
        """p_safe at the last token before each of the given offsets, or why a conversation has none."""
        readings: list[Reading] = [[] for _ in items]
        limit = self.model.config.max_position_embeddings
        read: list[tuple[int, list[int], int, list[int]]] = []
        for index, (messages, ends) in enumerate(items):
            ids, first, places = self._located(messages, ends)
            if len(ids) > limit:
                readings[index] = Failure(reason=f"has {len(ids)} tokens, but the guard reads {limit}")
            else:
                read.append((index, ids, first, places))
        read.sort(key=lambda found: len(found[1]))
        for begin in range(0, len(read), batch_size):
            rows = read[begin : begin + batch_size]
            logits_BLK = self._risk([ids for _, ids, _, _ in rows])
            for (index, ids, first, places), logits_LK in zip(rows, logits_BLK, strict=True):
                p_safe_T = class_share(logits_LK[first : len(ids), list(self.levels)], self.row)
                p_safe_T = smoothed(p_safe_T, debounce=self.row.debounce, monotone=self.row.monotone)
                readings[index] = p_safe_T[[place - first for place in places]].tolist()
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

    def _located(self, messages: Sequence[Message], ends: Sequence[int]) -> tuple[list[int], int, list[int]]:
        """The tokens of the conversation, the answer's first token, and the token read for each end."""
        answer = messages[-1]["content"]
        text = render(self.row, self.tokenizer, messages, answer)
        start, stripped = answer_place(text, as_plain(answer, self.tokenizer))
        ids, offsets = encode(Rendered(text=text, turns=(), special=self.row.special_tokens), self.tokenizer)
        first, places = tokens_at(offsets, start, [start + max(end - stripped, 1) for end in ends])
        return ids, first, places

    def _risk(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        ids_BL = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
        lengths_B = torch.tensor([len(ids) for ids in sequences])
        mask_BL = (torch.arange(ids_BL.shape[1]) < lengths_B[:, None]).long()
        with torch.inference_mode():
            logits_BLK = self.model(ids_BL.to(self.model.device), mask_BL.to(self.model.device))
        risk_BLK: torch.Tensor = logits_BLK.float().cpu()
        return risk_BLK


def load_stream(
    name: str,
    row: GuardRow,
    source: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str,
    dtype: str,
    device: str,
) -> StreamGuard:
    """Load a stream guard. Errors: ValueError for a model without the heads, or without the row's risk levels."""
    if isinstance(source, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, revision=revision)
        config = Qwen3Config.from_pretrained(source, revision=revision)
        for key in ("guard_inner_size", "num_risk_level", "response_risk_level_map"):
            if key not in config.to_dict():
                raise ValueError(f"guard {name!r}: {source} is not a stream guard, its config has no {key}")
        source, loading = TokenRiskModel.from_pretrained(
            source, revision=revision, dtype=dtype, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise ValueError(f"guard {name!r}: the weights lack {', '.join(sorted(loading['missing_keys']))}")
    if not isinstance(source, TokenRiskModel):
        raise ValueError(f"guard {name!r}: kind stream needs a TokenRiskModel, got {type(source).__name__}")
    if tokenizer is None:
        raise ValueError("a loaded guard model needs its tokenizer")
    names = {label: int(level) for level, label in source.config.response_risk_level_map.items()}
    for label in row.labels:
        if label not in names:
            raise ValueError(f"guard {name!r}: the model has no risk level {label!r}; it has: {', '.join(names)}")
    levels = tuple(names[label] for label in row.labels)
    model = source.to(device).eval()
    return StreamGuard(name=name, row=row, model=model, tokenizer=tokenizer, levels=levels, revision=revision)
