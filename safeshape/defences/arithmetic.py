"""Adding the direction of alignment to the weights: LoX before fine-tuning, RESTA after it.

Shape suffixes: O outputs and I inputs of a linear layer.
"""

import torch
from transformers import PreTrainedModel

from safeshape.defences.changes import linear_layers
from safeshape.defences.nested import merged
from safeshape.defences.records import Context, Defence, Model, generator, required, within


def low_rank(change_OI: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of this rank; rank 0 means the whole change."""
    if not rank or rank >= min(change_OI.shape):
        return change_OI
    u, s, vh = torch.linalg.svd(change_OI, full_matrices=False)
    part_OI: torch.Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return part_OI


def lox(*, rank: int = 0, strength: float = 1.0) -> Defence:
    """LoX (COLM 2025, arXiv 2506.15606): W0 + c * sum of the k first singular parts of W0 - W_base.

    `rank` is k, 0 for all; `strength` is c. Defaults are the released code's (k = 0, c = 1).
    """
    within("strength", strength, 0, float("inf"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank must be a whole number of at least 0, got {rank!r}")

    def before(model: PreTrainedModel, context: Context) -> PreTrainedModel:
        base = linear_layers(required(context.base, "base_model", "lox"))
        with torch.no_grad():
            for name, layer in linear_layers(model).items():
                if name not in base or base[name].weight.shape != layer.weight.shape:
                    raise ValueError(f"the base model has no layer {name} of the same shape; is it the same family?")
                change_OI = layer.weight.float() - base[name].weight.to(layer.weight.device).float()
                layer.weight.add_((strength * low_rank(change_OI, rank)).to(layer.weight))
        return model

    return Defence(
        name="lox",
        stage="before",
        source="LoX, arXiv 2506.15606",
        differs="all linear layers but the output layer are moved, whatever the adapter is put on",
        needs=frozenset({"base_model"}),
        before=before,
    )


def dropped(change: torch.Tensor, rate: float, seed: torch.Generator) -> torch.Tensor:
    """DARE (arXiv 2311.03099): each entry is 0 with probability `rate`, else divided by 1 - rate; same expectation."""
    if not rate:
        return change
    keep = torch.rand(change.shape, generator=seed) >= rate
    return change * keep.to(change) / (1 - rate)


def resta(*, strength: float = 0.5, drop_rate: float = 0.3) -> Defence:
    """RESTA (ACL 2024, arXiv 2402.11746): W = W_aligned + DARE(W_tuned - W_aligned) + gamma * (W_aligned - W_base).

    `strength` is gamma, `drop_rate` that of DARE; 0 leaves the change as it is.
    """
    within("strength", strength, 0, float("inf"))
    within("drop_rate", drop_rate, 0, 0.999)

    def finish(model: Model, context: Context) -> Model:
        start = dict(required(context.start, "start", "resta").named_parameters())
        base = dict(required(context.base, "base_model", "resta").named_parameters())
        whole, seed = merged(model), generator(context.args.seed)
        with torch.no_grad():
            for name, weight in whole.named_parameters():
                if name not in base or base[name].shape != weight.shape:
                    raise ValueError(f"the base model has no weight {name} of the same shape; is it the same family?")
                w0 = start[name].float().cpu()
                change = dropped(weight.float().cpu() - w0, drop_rate, seed)
                weight.copy_(w0 + change + strength * (w0 - base[name].float().cpu()))
        return whole

    return Defence(
        name="resta",
        stage="after",
        source="RESTA, arXiv 2402.11746",
        differs=(
            "DARE drops from the change since the aligned model; gamma 0.5 and drop rate 0.3 are our defaults, the "
            "paper chooses gamma per model; an adapter comes out merged into its base"
        ),
        needs=frozenset({"base_model"}),
        keeps_start="always",
        finish=finish,
    )
