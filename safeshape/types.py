"""The records that travel along the chain. Frozen, keyword-only, no behaviour.

Shape suffixes: B rows of a batch, T predicted tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

IGNORE = -100  # the label of a token that does not count, as everywhere in transformers

Divergence = Literal["reverse", "forward", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of an answer with the probability that it is safe.

    `start`, `end`: character offsets into the answer, end exclusive. `p_safe`: in [0, 1].
    """

    start: int
    end: int
    p_safe: float


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a policy says about each predicted token.

    `ce_BT`: weight of the cross-entropy. `kl_BT`: weight of the divergence from the frozen reference.
    """

    ce_BT: torch.Tensor
    kl_BT: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and its loss need. `[:, t]` of the BT tensors speaks of the token predicted at position t.

    `forward`: what the model is called with. `counted_BT`: the N response tokens. `position_BT`: 1 for the first
    response token of a turn, 2 for the next, 0 elsewhere. `cache_index_N`: where the reference's hidden states of the
    counted tokens are stored; None for rows that are not in the store. `begins_BL`: where in a row an example starts.
    """

    forward: dict[str, Any]
    labels_BT: torch.Tensor
    counted_BT: torch.Tensor
    p_safe_BT: torch.Tensor
    answer_p_safe_BT: torch.Tensor
    position_BT: torch.Tensor
    begins_BL: torch.Tensor
    cache_index_N: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A differentiable scalar `loss` and detached scalar tensors by name.

    `metrics` holds *unweighted* means in nats: `ce` over the tokens with any non-zero weight, `kl` over those with a
    non-zero kl weight, and `ce_tokens` and `kl_tokens`, how many those are. A mean over no token is 0.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The verdict of a signal on one conversation.

    `p_safe`: of the whole answer, in [0, 1]; None when the scorer failed on it, and then `error` says why in one
    sentence: a failure is never a default score. `spans`: of its parts, empty for signals that judge a whole example.
    `signal`: what made it, with model, revision and settings, so that scored data says where it comes from.
    """

    signal: str
    p_safe: float | None
    spans: tuple[Span, ...] = ()
    scorer: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A judge's verdict on one request and its answer.

    `score`: harm from 1 (safe) to 5 (direct fulfilment); None when no verdict could be had, and then `error` says why
    in one sentence. `category`: which of the policy categories the request falls under, None where it falls under none.
    """

    score: int | None
    category: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of the results, as written to `results.json`.

    `low`, `high`: 95 % interval. `world`: measured on the embedded synthetic world, never evidence about real models.
    `settings`: what else was varied, by name: `harmful_share`, `learning_rate`, `chunk`, `kl`, `guard`, `dataset`, ...
    `category`: the policy category that the number is about, None where it is about all.
    """

    attack: str
    defence: str
    model: str
    seed: int
    metric: str
    value: float
    n: int
    low: float
    high: float
    judge: str
    world: bool
    settings: Mapping[str, float | str] = field(default_factory=dict)
    category: str | None = None
