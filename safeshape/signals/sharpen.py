"""The near-hard scores of the released STAR-DSS code: what sampling settings do to the logits of a guard's labels.

Shape suffixes: N sequences, K label tokens.
"""

import torch
from pydantic.dataclasses import dataclass
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from safeshape.config.parser import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sharpen:
    """The generation settings the released code leaves on while it reads a guard; its values are the defaults."""

    temperature: float = 0.2
    top_p: float = 0.9
    repetition_penalty: float = 1.2

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("repetition_penalty", self.repetition_penalty)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def sharpened(logits_NK: torch.Tensor, sharpen: Sharpen, seen_NK: torch.Tensor | None = None) -> torch.Tensor:
    """Label logits (N, K) after repetition penalty, temperature and top-p; a label that top-p drops becomes -inf.

    `seen_NK`: which labels occur in the guard's own input, the ones that the penalty touches; default: all, since a
    guard's instruction names its labels.
    Source: the released code of STAR-DSS (arXiv 2505.17196) reads `generate(output_scores=True)` with these settings.
    Differs: top-p is taken over the labels, there over the whole vocabulary, which is the same where the labels hold
    the mass; top-k 50 never drops one of so few labels.
    """
    logits_NK = logits_NK.float()
    every_NK = torch.arange(logits_NK.shape[1], device=logits_NK.device).expand(logits_NK.shape)
    penalised_NK = RepetitionPenaltyLogitsProcessor(float(sharpen.repetition_penalty))(every_NK, logits_NK)
    if seen_NK is not None:
        penalised_NK = torch.where(seen_NK, penalised_NK, logits_NK)
    warmed_NK = TemperatureLogitsWarper(float(sharpen.temperature))(every_NK, penalised_NK)
    kept_NK: torch.Tensor = TopPLogitsWarper(float(sharpen.top_p))(every_NK, warmed_NK)
    return kept_NK
