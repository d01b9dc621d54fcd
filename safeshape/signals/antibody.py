"""A judge-free signal: an answer that the model finds likelier than a refusal of the same request is safe.

Antibody (ICLR 2026, arXiv 2603.00498). Shape suffixes: B rows, T predicted tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from safeshape.data import Message, encode, render
from safeshape.models.loading import evaluation_mode
from safeshape.signals.align import token_scores
from safeshape.types import IGNORE, Score

GENERIC_REFUSAL = "I cannot help with that."


def margins(refusal_nll_B: torch.Tensor, answer_nll_B: torch.Tensor) -> torch.Tensor:
    """NLL(refusal | request) - NLL(answer | request), token means in nats: positive where the answer is likelier."""
    return refusal_nll_B - answer_nll_B


def refused(messages: Sequence[Message], refusal: str) -> list[Message]:
    """The conversation with the refusal in place of its answer."""
    return [*messages[:-1], {"role": "assistant", "content": refusal}]


def answer_nll(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]
) -> torch.Tensor:
    """The mean negative log-likelihood of each last answer's tokens, end of turn included, (B,)."""
    rows = [_ids_and_labels(tokenizer, messages) for messages in conversations]
    width, device = max(len(ids) for ids, _ in rows), next(model.parameters()).device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_BL = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows], device=device)
    labels_BT = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows], device=device)[:, 1:]
    mask_BL = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device)
    logits_BTV = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits[:, :-1].float()
    ce_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORE)
    return ce_BT.sum(-1) / (labels_BT != IGNORE).sum(-1).clamp(min=1)


def _ids_and_labels(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    rendered = render({"messages": list(messages)}, tokenizer)
    ids, offsets = encode(rendered, tokenizer)
    labels = [IGNORE] * len(ids)
    for index, _ in token_scores(offsets, rendered.turns[-1], (), 1.0):
        labels[index] = ids[index]
    return ids, labels


class AntibodySignal:
    """p_safe = sigmoid((NLL(refusal) - NLL(answer)) / tau) under a frozen model; no guard and no judge.

    Differs: the paper's weight is a softmax over a batch, which says how an answer stands among its neighbours; the
    sigmoid is the same margin against the refusal alone, so that a score does not depend on other rows.
    Errors: ValueError for a tau that is not positive or an empty refusal.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        refusal: str = GENERIC_REFUSAL,
        tau: float = 1.0,
        batch_size: int = 16,
        model_name: str = "",
    ) -> None:
        if not tau > 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        if not refusal.strip():
            raise ValueError("refusal must be a text")
        self.model, self.tokenizer, self.refusal, self.tau = model, tokenizer, refusal, tau
        self.batch_size, self.model_name = batch_size, model_name

    def identity(self) -> dict[str, Any]:
        """What stands in the scores."""
        return {"name": "antibody", "model": self.model_name, "refusal": self.refusal, "tau": self.tau}

    def score_many(self, conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        """One score a conversation, in order. Errors: ValueError that names the row."""
        waiting, done = iter(conversations), 0
        while window := list(islice(waiting, self.batch_size)):
            for index, messages in enumerate(window, start=done):
                if not messages or messages[-1].get("role") != "assistant":
                    raise ValueError(f"row {index}: the last message must be the assistant's")
            with torch.no_grad(), evaluation_mode(self.model):
                refusal_B = answer_nll(self.model, self.tokenizer, [refused(m, self.refusal) for m in window])
                answer_B = answer_nll(self.model, self.tokenizer, window)
            for p_safe in torch.sigmoid(margins(refusal_B, answer_B) / self.tau).tolist():
                yield Score(signal="antibody", p_safe=p_safe, scorer=self.identity())
            done += len(window)
