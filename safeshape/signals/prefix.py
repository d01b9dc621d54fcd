"""Label logits of many token sequences: what a causal guard thinks after each partial answer.

The sequences of one answer differ little from each other: each is the beginning of one long sequence, the trunk, and
then a few tokens of its own. The trunk is run once; every branch starts at its longest common token prefix with the
trunk and runs only what follows. What all rows of a run have in common is run once per run.

Shape suffixes: S sequences, K label tokens, L tokens of the padded batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from safeshape.signals.partials import Branch, common_length
from safeshape.signals.shared_attention import Plan, Reach, Segment, Trunk, sharing

Ids = Sequence[int]


def naive_label_logits(
    model: PreTrainedModel, sequences: Sequence[Ids], label_ids: Ids, *, batch_size: int = 64
) -> torch.Tensor:
    """The logits of the label tokens after each sequence, shape (S, K) in float32: one full forward per sequence.

    The truth that faster scorers are tested against. Batched by length; padding is on the left and masked, so it never
    changes a score.
    """
    limit = long_limit(model.config)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    found_SK = torch.zeros(len(sequences), len(label_ids))
    with torch.inference_mode():
        while order:
            # A longrope model picks its factors by the longest row of a batch: short and long rows stay apart.
            far = [len(sequences[row]) > limit for row in order[:batch_size]]
            rows = order[: far.index(True) if far[-1] and not far[0] else batch_size]
            order = order[len(rows) :]
            width = max(len(sequences[row]) for row in rows)
            gaps = [width - len(sequences[row]) for row in rows]
            ids_SL = torch.tensor([[0] * gap + list(sequences[row]) for row, gap in zip(rows, gaps, strict=True)])
            mask_SL = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
            logits = model(
                input_ids=ids_SL.to(model.device),
                attention_mask=mask_SL.to(model.device),
                position_ids=(mask_SL.cumsum(-1) - 1).clamp(min=0).to(model.device),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
            found_SK[rows] = logits[:, list(label_ids)].float().cpu()
    return found_SK


def layer_reaches(config: PreTrainedConfig) -> list[Reach]:
    """How far back each layer sees.

    Errors: ValueError for a layer that is not softmax attention over earlier tokens (recurrent, compressed, shared).
    """
    text = config.get_text_config()
    kinds: dict[str, Literal["full", "sliding", "chunked"]] = {
        "full_attention": "full",
        "sliding_attention": "sliding",
        "chunked_attention": "chunked",
    }
    found = []
    for kind, options in zip(*get_layer_types_and_kwargs(text), strict=True):
        if kind not in kinds:
            raise ValueError(f"layers of type {kind} cannot share a prefill")
        found.append(Reach(kind=kinds[kind], size=options.get("sliding_window") or 0))
    return found


def long_limit(config: PreTrainedConfig) -> float:
    """The length above which a longrope model uses its long factors; infinite for other models."""
    rope = config.get_text_config().to_dict().get("rope_parameters") or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    limits = [t["original_max_position_embeddings"] for t in tables if t.get("rope_type") == "longrope"]
    return min(limits, default=float("inf"))


def context_length(config: PreTrainedConfig) -> float:
    """The longest sequence that the model knows positions for; infinite for a model without positions."""
    return float(config.get_text_config().to_dict().get("max_position_embeddings") or "inf")


def plain_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The layer from hidden states to logits. Errors: ValueError when it is not a plain linear one (quantised, say)."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"the head is a {type(head).__name__}, not a plain linear layer")
    return head


@contextmanager
def label_head(model: PreTrainedModel, label_ids: Ids) -> Iterator[None]:
    """Inside, the model's logits are those of the label tokens alone; scaling and soft caps are the model's own."""
    head = plain_head(model)
    rows = torch.nn.Linear(head.in_features, len(label_ids), bias=head.bias is not None, device="meta")
    picked = torch.tensor(list(label_ids), device=head.weight.device)
    rows.weight = torch.nn.Parameter(head.weight.detach()[picked], requires_grad=False)
    if head.bias is not None:
        rows.bias = torch.nn.Parameter(head.bias.detach()[picked], requires_grad=False)
    model.set_output_embeddings(rows)
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def check_length(length: int, context: float) -> None:
    """Errors: ValueError when a sequence is empty or longer than the guard's context."""
    if not 0 < length <= context:
        raise ValueError(f"the text is {length} tokens for the guard, whose context is {context:.0f} tokens")


def is_long(segment: Segment) -> bool:
    """Whether a segment wants the long factors of a longrope model."""
    return segment.trunk is not None and segment.trunk.long


class NaiveScorer:
    """The same calls, each branch in a forward of its own: for models that cannot share a prefill, and as the truth."""

    def __init__(self, model: PreTrainedModel, label_ids: Ids, *, batch_size: int = 64) -> None:
        self.model, self.label_ids, self.batch_size = model, tuple(label_ids), batch_size
        self.context = context_length(model.config)
        self.forwarded = 0

    def batched(self, batch_size: int) -> "NaiveScorer":
        """The same with another number of sequences per forward."""
        return NaiveScorer(self.model, self.label_ids, batch_size=batch_size)

    def open_many(self, rows: Sequence[Ids]) -> list[Trunk]:
        """Nothing is run. Errors: ValueError when a row is empty or longer than the guard's context."""
        for ids in rows:
            self.check_length(len(ids))
        return [Trunk(ids=list(ids)) for ids in rows]

    def label_logits_many(self, requests: Sequence[tuple[Trunk, Sequence[Branch]]]) -> list[torch.Tensor]:
        """The logits of the label tokens after each branch, (S, K) in float32 for each trunk."""
        found = []
        for trunk, branches in requests:
            rows = [[*trunk.ids[: branch.kept], *branch.ids] for branch in branches]
            self.forwarded += sum(map(len, rows))
            found.append(naive_label_logits(self.model, rows, self.label_ids, batch_size=self.batch_size))
        return found

    def check_length(self, length: int) -> None:
        """Errors: ValueError when a sequence is empty or longer than the guard's context."""
        check_length(length, self.context)


class PrefixScorer:
    """Scores branches of trunks with one prefill each.

    `max_tokens`: tokens of one forward, which bounds memory beside the trunks' own keys and values; default 1024 on a
    CPU, 16384 elsewhere. `forwarded`: tokens run so far.
    Errors: ValueError for a model whose layers or head cannot be shared this way.
    """

    def __init__(self, model: PreTrainedModel, label_ids: Ids, *, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if not model._supports_attention_backend:
            raise ValueError(f"{type(model).__name__} does not take its attention from a function")
        plain_head(model)
        self.model, self.label_ids = model, tuple(label_ids)
        self.max_tokens = max_tokens or (1024 if model.device.type == "cpu" else 16384)
        self.reaches = layer_reaches(model.config)
        self.long_limit = long_limit(model.config)
        self.context = context_length(model.config)
        self.forwarded = 0
        self.forget()

    def forget(self) -> None:
        """Drop what the last trunks had in common, as at the start of a run: the model may have changed since."""
        self._header = Trunk(ids=[])

    def open(self, ids: Ids) -> Trunk:
        """Run a trunk. Errors: ValueError when it is empty or longer than the guard's context."""
        return self.open_many([ids])[0]

    def open_many(self, rows: Sequence[Ids]) -> list[Trunk]:
        """Run trunks together; what they have in common with each other and with the trunks before is run once."""
        for ids in rows:
            self.check_length(len(ids))
        far = [len(ids) > self.long_limit for ids in rows]
        if len(set(far)) > 1:
            return [self.open(ids) for ids in rows]
        if not rows:
            return []
        with torch.inference_mode():
            common = list(rows[0])
            for ids in rows[1:]:
                common = common[: common_length(common, list(ids))]
            kept = common_length(self._header.ids, common) if self._header.long == far[0] else 0
            self._header = self._grow(self._header, self._header.ids[:kept], far[0])
            if len(rows) > 1 and len(common) > kept:
                self._header = self._grow(self._header, common, far[0])
                self._fill([self._header])
            trunks = [self._grow(self._header, list(ids), far[0]) for ids in rows]
            self._fill(trunks)
        if len(rows) == 1:
            self._header = trunks[0]
        return trunks

    def label_logits(self, trunk: Trunk, branches: Sequence[Branch]) -> torch.Tensor:
        """The logits of the label tokens after each branch, shape (S, K) in float32.

        Errors: ValueError for a branch that is empty or longer than the guard's context.
        """
        return self.label_logits_many([(trunk, branches)])[0]

    def label_logits_many(self, requests: Sequence[tuple[Trunk, Sequence[Branch]]]) -> list[torch.Tensor]:
        """`label_logits` of several trunks, packed together."""
        with torch.inference_mode():
            segments = [self._segment(trunk, branch) for trunk, branches in requests for branch in branches]
            # Branches of one trunk lie together and in the order of where they leave it: they see the same stretch.
            rank = {key: index for index, key in enumerate(dict.fromkeys(id(segment.trunk) for segment in segments))}
            order = sorted(range(len(segments)), key=lambda i: (rank[id(segments[i].trunk)], segments[i].start))
            found_SK = torch.zeros(len(segments), len(self.label_ids))
            for batch in self._batches(segments, order):
                found_SK[batch] = self._forward([segments[i] for i in batch], collect=False)[1].float().cpu()
        return list(torch.split(found_SK, [len(branches) for _, branches in requests]))

    def check_length(self, length: int) -> None:
        """Errors: ValueError when a sequence is empty or longer than the guard's context."""
        check_length(length, self.context)

    def _segment(self, trunk: Trunk, branch: Branch) -> Segment:
        length = branch.kept + len(branch.ids)
        self.check_length(length)
        kept, ids = branch.kept, list(branch.ids)
        shared = common_length(trunk.ids[kept : kept + len(ids)], ids)
        if kept + shared == length:
            shared -= 1
        if shared < 0:
            kept, shared, ids = length - 1, 0, [trunk.ids[length - 1]]
        kept, ids = kept + shared, ids[shared:]
        is_long = length > self.long_limit
        if trunk.long != is_long:
            if trunk.other is None:
                limit = len(trunk.ids) if is_long else int(self.long_limit)
                trunk.other = self._grow(Trunk(ids=[], long=is_long), trunk.ids[:limit], is_long)
                self._fill([trunk.other])
            trunk = trunk.other
        if len(ids) > self.max_tokens:
            trunk = self._grow(trunk, trunk.ids[:kept] + ids, is_long)
            self._fill([trunk])
            kept, ids = length - 1, ids[-1:]
        return Segment(trunk=trunk, start=kept, ids=ids)

    def _batches(self, segments: Sequence[Segment], order: Sequence[int]) -> Iterator[list[int]]:
        """Runs of segments that fit into one forward and want the same factors of a longrope model."""
        batch: list[int] = []
        tokens = 0
        for index in order:
            size = len(segments[index].ids)
            if batch and (tokens + size > self.max_tokens or is_long(segments[index]) != is_long(segments[batch[0]])):
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += size
        if batch:
            yield batch

    def _grow(self, source: Trunk, ids: list[int], is_long: bool) -> Trunk:
        """A trunk for `ids` with room for all of them, which begins with what it shares with `source`."""
        kept = min(common_length(source.ids, ids), source.filled) if source.long == is_long else 0
        if kept == len(source.ids) == len(ids):
            return source
        grown = Trunk(ids=ids, filled=kept, long=is_long)
        for there, here in ((source.keys, grown.keys), (source.values, grown.values)):
            for layer, tensor in there.items():
                here[layer] = tensor.new_empty(tensor.shape[0], len(ids), tensor.shape[2])
                here[layer][:, :kept] = tensor[:, :kept]
        return grown

    def _fill(self, trunks: Sequence[Trunk]) -> None:
        """Run what is missing of the trunks, at most `max_tokens` at a time."""
        while waiting := [trunk for trunk in trunks if trunk.filled < len(trunk.ids)]:
            segments, room = [], self.max_tokens
            for trunk in waiting:
                ids = trunk.ids[trunk.filled : trunk.filled + room]
                if ids:
                    segments.append(Segment(trunk=trunk, start=trunk.filled, ids=ids))
                room -= len(ids)
            plan, _ = self._forward(segments, collect=True)
            for index, segment in enumerate(segments):
                begin, end = plan.offsets[index], plan.offsets[index + 1]
                trunk = waiting[index]
                trunk.filled = segment.start + end - begin
                for layer, kept in plan.kept.items():
                    for store, packed in zip((trunk.keys, trunk.values), kept, strict=True):
                        if layer not in store:
                            store[layer] = packed.new_empty(packed.shape[0], len(trunk.ids), packed.shape[2])
                        store[layer][:, segment.start : trunk.filled] = packed[:, begin:end]

    def _forward(self, segments: list[Segment], *, collect: bool) -> tuple[Plan, torch.Tensor]:
        count, packed = len(segments), segments
        if is_long(segments[0]):
            # One token far out makes a longrope model use its long factors, as the whole sequence would.
            packed = [*segments, Segment(trunk=None, start=int(self.long_limit), ids=(0,))]
        plan = Plan(packed, self.reaches, self.model.device, collect)
        self.forwarded += plan.offsets[-1]
        keep_S = plan.last_S[:1] if collect else plan.last_S[:count]
        with sharing(self.model, plan), label_head(self.model, self.label_ids):
            logits: Any = self.model(
                input_ids=plan.ids_N[None],
                position_ids=plan.positions_N[None],
                use_cache=False,
                logits_to_keep=keep_S,
            ).logits
        return plan, logits[0]


def choose_scorer(
    model: PreTrainedModel, label_ids: Ids, sample: Ids, *, max_tokens: int | None = None
) -> tuple[PrefixScorer | NaiveScorer, str]:
    """The fast scorer where it is exact for this model, else the naive one; and why, in one sentence.

    Its layers must be ordinary causal attention, and its logits on a sample must equal the naive ones, up to rounding.
    """
    try:
        scorer = PrefixScorer(model, label_ids, max_tokens=max_tokens)
        half = len(sample) // 2
        branches = [Branch(kept=0, ids=tuple(sample[:end]) + tuple(sample[half:])) for end in (1, half, len(sample))]
        got_SK = scorer.label_logits(scorer.open(sample), branches)
    except (ValueError, NotImplementedError) as error:
        return NaiveScorer(model, label_ids), f"naive: {error}"
    want_SK = naive_label_logits(model, [branch.ids for branch in branches], label_ids)
    rounding = max(1e-3, 16 * torch.finfo(model.dtype).eps) * (1 + float(want_SK.abs().max()))
    if not float((got_SK - want_SK).abs().max()) <= rounding:
        return NaiveScorer(model, label_ids), "naive: a shared prefill changes this model's logits"
    return scorer, "shared prefill"
