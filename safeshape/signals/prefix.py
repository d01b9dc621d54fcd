"""Label logits of many token sequences: what a causal guard thinks after each partial answer.

Shape suffixes: S sequences, K label tokens, L tokens of the padded batch.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def naive_label_logits(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], label_ids: Sequence[int], *, batch_size: int = 64
) -> torch.Tensor:
    """The logits of the label tokens after each sequence, shape (S, K) in float32: one full forward per sequence.

    The truth that faster scorers are tested against. Batched by length; padding is on the left and masked, so it never
    changes a score.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    found_SK = torch.zeros(len(sequences), len(label_ids))
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
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
