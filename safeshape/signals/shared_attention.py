"""Attention of many short token segments over a trunk that they share, without copying the trunk for any of them.

The segments of one forward lie packed in one row of tokens, so linear layers see no padding. A segment sees the first
`start` tokens of its trunk and its own earlier tokens. Both parts are computed apart, each with the log of its softmax
sum, and joined exactly: softmax over a union is the mean of the softmaxes weighted by their sums.

Shape suffixes: N packed tokens, S segments, T tokens of a segment, P trunk tokens, H query heads, U key heads,
G query heads per key head, D channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from transformers import AttentionInterface, PreTrainedModel

NAME = "safeshape_shared"
# Segments attend to themselves in padded groups; a group takes segments down to this share of its longest.
SAME_LENGTH = 0.8
# Segments that leave their trunk within so many tokens see it in one go; where they differ, a mask is needed.
SPREAD = 1024


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far back a layer sees: everything, the last `size` tokens, or the tokens of its own block of `size`."""

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0


@dataclass(kw_only=True)
class Trunk:
    """Tokens that were run once, with the keys and values of every layer, each of shape (U, P, D).

    `filled`: how many tokens have been run. `long`: whether the long factors of a longrope model were used.
    """

    ids: list[int]
    filled: int = 0
    long: bool = False
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    other: "Trunk | None" = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that follow the first `start` tokens of a trunk; without a trunk they stand alone at position `start`."""

    trunk: Trunk | None
    start: int
    ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The packed tokens [begin, end) of neighbouring segments of one trunk.

    `starts`: how much of the trunk each token sees; between `low` and `high`.
    """

    trunk: Trunk
    begin: int
    end: int
    starts: torch.Tensor
    low: int
    high: int


class Plan:
    """Where the packed tokens of one forward are and what they see; keys and values are kept when `collect`."""

    def __init__(self, segments: Sequence[Segment], reaches: Sequence[Reach], device: torch.device, collect: bool):
        self.reaches, self.collect, self.device = reaches, collect, device
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[Any, Any] = {}
        lengths = [len(segment.ids) for segment in segments]
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        self.offsets = offsets
        positions = [segment.start + i for segment in segments for i in range(len(segment.ids))]
        self.positions_N = torch.tensor(positions, device=device)
        self.ids_N = torch.tensor([token for segment in segments for token in segment.ids], device=device)
        self.last_S = torch.tensor(offsets[1:], device=device) - 1
        self.groups = list(_groups(segments, offsets, device))
        self.buckets = [_bucket(rows, offsets, lengths, device) for rows in _same_length(lengths)]

    def trunk_pieces(
        self, group: Group, reach: Reach, dtype: torch.dtype
    ) -> list[tuple[int, int, torch.Tensor | None]]:
        """The stretches [begin, end) of a trunk that a group sees, each with its additive mask or None."""
        key = ("trunk", group.begin, reach, dtype)
        if key not in self._masks:
            positions_N = self.positions_N[group.begin : group.end]
            if reach.kind == "full":
                whole: list[tuple[int, int, torch.Tensor | None]] = [(0, group.low, None)] if group.low else []
                begin = group.low
            else:
                whole, first = [], int(positions_N.min())
                oldest = first - reach.size + 1 if reach.kind == "sliding" else first // reach.size * reach.size
                begin = min(max(oldest, 0), group.high)
            if begin < group.high:
                trunk_P = torch.arange(begin, group.high, device=self.device)
                seen_NP = trunk_P < group.starts[:, None]
                seen_NP &= near(positions_N[:, None], trunk_P, reach)
                whole.append((begin, group.high, additive(seen_NP, dtype)))
            self._masks[key] = whole
        pieces: list[tuple[int, int, torch.Tensor | None]] = self._masks[key]
        return pieces

    def own_mask(self, bucket: int, reach: Reach, dtype: torch.dtype) -> torch.Tensor | None:
        """The additive mask (S, 1, T, T) of a bucket's segments over themselves; None where it is plainly causal."""
        key = ("own", bucket, reach, dtype)
        if key not in self._masks:
            slots_ST, _ = self.buckets[bucket]
            width = slots_ST.shape[1]
            mask = None
            if reach.kind == "chunked" or (reach.kind == "sliding" and width > reach.size):
                step_T = torch.arange(width, device=self.device)
                at_ST = self.positions_N[slots_ST[:, :1]] + step_T
                seen_STT = (step_T[:, None] >= step_T) & near(at_ST[:, :, None], at_ST[:, None, :], reach)
                mask = additive(seen_STT, dtype)[:, None]
            self._masks[key] = mask
        found: torch.Tensor | None = self._masks[key]
        return found


def near(query: torch.Tensor, key: torch.Tensor, reach: Reach) -> torch.Tensor:
    """Whether a key's position is within a query's reach; causality is checked elsewhere."""
    if reach.kind == "sliding":
        return key > query - reach.size
    if reach.kind == "chunked":
        return key // reach.size == query // reach.size
    return torch.ones_like(key + query, dtype=torch.bool)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zero where seen; else a finite number so low that a row which sees nothing gets no weight when parts are joined.

    Rows are aligned to 16 numbers, which CUDA's kernel asks for.
    """
    width = seen.shape[-1]
    room = torch.zeros(*seen.shape[:-1], -(-width // 16) * 16, dtype=dtype, device=seen.device)
    return room[..., :width].masked_fill_(~seen, torch.finfo(dtype).min / 2)


def _groups(segments: Sequence[Segment], offsets: Sequence[int], device: torch.device) -> Iterator[Group]:
    index = 0
    while index < len(segments):
        trunk, first = segments[index].trunk, index
        while index < len(segments) and segments[index].trunk is trunk:
            if abs(segments[index].start - segments[first].start) > SPREAD:
                break
            index += 1
        starts = [segment.start for segment in segments[first:index]]
        if trunk is None or max(starts) == 0:
            continue
        lengths = torch.tensor([len(segment.ids) for segment in segments[first:index]])
        yield Group(
            trunk=trunk,
            begin=offsets[first],
            end=offsets[index],
            starts=torch.tensor(starts).repeat_interleave(lengths).to(device),
            low=min(starts),
            high=max(starts),
        )


def _same_length(lengths: Sequence[int]) -> list[list[int]]:
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if buckets and lengths[index] >= SAME_LENGTH * lengths[buckets[-1][0]]:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


def _bucket(
    rows: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed index of each token of a bucket's segments, shape (S, T), and which of them are not padding."""
    width = max(lengths[row] for row in rows)
    step_T = torch.arange(width)
    size_S = torch.tensor([lengths[row] for row in rows])
    begin_S = torch.tensor([offsets[row] for row in rows])
    valid_ST = step_T < size_S[:, None]
    slots_ST = torch.where(valid_ST, begin_S[:, None] + step_T, begin_S[:, None])
    return slots_ST.to(device), valid_ST.to(device)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log of its softmax sum, in float32; four-dimensional inputs (batch, heads, tokens, D).

    Torch's fused kernels give the log-sum too, but only through their operators. Soft-capped logits and devices
    without such a kernel take the plain form.
    """
    fused = softcap is None and query.shape[-1] == value.shape[-1]
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], -1, -1)
    if fused and query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out.float(), lse.float()
    if fused and query.device.type == "cuda":
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, causal, scale=scale
        )
        return out.float(), lse[..., : query.shape[2]].float()
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask.float()
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, torch.finfo(torch.float32).min / 2)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).to(value.dtype).matmul(value).float(), lse


def join(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each and its log-sum."""
    lse = torch.logaddexp(first[1], second[1])
    share = [torch.exp(part[1] - lse)[..., None] for part in (first, second)]
    return first[0] * share[0] + second[0] * share[1], lse


_PLAN: ContextVar[Plan] = ContextVar("safeshape_plan")


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer; inputs (1, H, N, D) and (1, U, N, D).

    `s_aux`: a learned logit per head that takes weight from all keys (gpt-oss).
    Errors: NotImplementedError for a position bias.
    """
    if position_bias is not None:
        raise NotImplementedError("attention with a position bias")
    plan, layer = _PLAN.get(), cast(int, module.layer_idx)
    reach, scale = plan.reaches[layer], scaling if scaling is not None else query.shape[-1] ** -0.5
    query_HND, key_UND, value_UND = query[0], key[0], value[0]
    if plan.collect:
        plan.kept[layer] = (key_UND, value_UND)
    out_NHD, lse_NH = _own(plan, query_HND, key_UND, value_UND, reach, scale, softcap)
    per_key = query_HND.shape[0] // key_UND.shape[0]
    query_UGND = query_HND.view(key_UND.shape[0], per_key, *query_HND.shape[1:])
    for group in plan.groups:
        rows = slice(group.begin, group.end)
        trunk_key, trunk_value = group.trunk.keys[layer], group.trunk.values[layer]
        for begin, end, mask in plan.trunk_pieces(group, reach, query.dtype):
            out, lse = attend(
                query_UGND[:, :, rows],
                trunk_key[:, None, begin:end].expand(-1, per_key, -1, -1),
                trunk_value[:, None, begin:end].expand(-1, per_key, -1, -1),
                mask,
                causal=False,
                scale=scale,
                softcap=softcap,
            )
            part = (out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1))
            out_NHD[rows], lse_NH[rows] = join((out_NHD[rows], lse_NH[rows]), part)
    if s_aux is not None:
        out_NHD = out_NHD * torch.sigmoid(lse_NH - s_aux.float())[..., None]
    return out_NHD[None].to(query.dtype), None


def _own(
    plan: Plan,
    query_HND: torch.Tensor,
    key_UND: torch.Tensor,
    value_UND: torch.Tensor,
    reach: Reach,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every segment over itself, shapes (N, H, D) and (N, H). Padding is on the right, so no real token sees it."""
    heads, tokens, _ = query_HND.shape
    out_NHD = query_HND.new_empty((tokens, heads, value_UND.shape[-1]), dtype=torch.float32)
    lse_NH = query_HND.new_empty((tokens, heads), dtype=torch.float32)
    for index, (slots_ST, valid_ST) in enumerate(plan.buckets):

        def pick(packed: torch.Tensor, slots_ST: torch.Tensor = slots_ST) -> torch.Tensor:
            repeated = packed.repeat_interleave(heads // packed.shape[0], 0)
            return repeated[:, slots_ST].transpose(0, 1)

        mask = plan.own_mask(index, reach, query_HND.dtype)
        out, lse = attend(
            pick(query_HND), pick(key_UND), pick(value_UND), mask, causal=mask is None, scale=scale, softcap=softcap
        )
        at = slots_ST[valid_ST]
        out_NHD[at], lse_NH[at] = out.transpose(1, 2)[valid_ST], lse.transpose(1, 2)[valid_ST]
    return out_NHD, lse_NH


@contextmanager
def sharing(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Inside, the model's attention follows the plan; afterwards it is what it was."""
    config = model.config.get_text_config()
    before, token = config._attn_implementation, _PLAN.set(plan)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _PLAN.reset(token)


AttentionInterface.register(NAME, shared_attention)
