"""Methods that look at single weights with the help of calibration data: Antidote, Safe Delta.

Shape suffixes: O outputs and I inputs of a linear layer, N tokens, B rows, L tokens of the padded batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from safeshape.data import ShapedCollator
from safeshape.defences.changes import linear_layers, lora_layers
from safeshape.defences.nested import merged
from safeshape.defences.records import Context, Defence, Model, required, whole_number, within
from safeshape.defences.stepping import forward_of
from safeshape.models.loading import evaluation_mode
from safeshape.signals.align import prepare

Take = Callable[[str, torch.Tensor], None]


def calibration_batches(dataset: Dataset, context: Context, count: int, device: torch.device) -> Iterator[Any]:
    """The first `count` rows as batches of the run's size, on the device."""
    rows = prepare(
        dataset.select(range(min(count, len(dataset)))),
        context.tokenizer,
        needs_signal=False,
        max_length=context.args.max_length,
        overlong="truncate",
        name="calibration",
    )
    pad = context.tokenizer.pad_token_id
    collate = ShapedCollator(
        DataCollatorForLanguageModeling(pad_token_id=context.tokenizer.eos_token_id if pad is None else pad)
    )
    size = context.args.per_device_train_batch_size
    for begin in range(0, len(rows), size):
        batch = collate([rows[i] for i in range(begin, min(begin + size, len(rows)))])
        yield {name: value.to(device) for name, value in batch.items()}


@contextmanager
def _reading(layers: Mapping[str, nn.Module], take: Take) -> Iterator[dict[str, torch.Tensor]]:
    """Hands what goes into each layer, padding left out, to `take`. The yielded dict holds the batch's mask."""
    now: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            take(name, given[0].detach()[now["mask"]].float())

        return read

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


def read_inputs(
    model: Model, layers: Mapping[str, nn.Module], dataset: Dataset, context: Context, count: int, take: Take
) -> None:
    """Run the rows through the model and hand every layer's inputs (N, I) to `take`, batch by batch."""
    device = next(model.parameters()).device
    with torch.no_grad(), evaluation_mode(model), _reading(layers, take) as now:
        for batch in calibration_batches(dataset, context, count, device):
            now["mask"] = batch["attention_mask"].bool()
            model(**forward_of(batch), use_cache=False)


def keep_mask(weight_OI: torch.Tensor, norms_I: torch.Tensor, dense_ratio: float) -> torch.Tensor:
    """Which weights stay: in each row all but those of highest |W_ij| * ||X_j||, a share of `dense_ratio`.

    As in the released code the number that stays is int(I * (1 - dense_ratio)), ties by position.
    """
    scores_OI = weight_OI.abs().float() * norms_I
    stay = int(weight_OI.shape[1] * (1 - dense_ratio))
    order_OI = scores_OI.sort(dim=-1, stable=True).indices
    return torch.zeros_like(weight_OI, dtype=torch.bool).scatter_(1, order_OI[:, :stay], True)


def _antidote_layers(model: Model) -> dict[str, nn.Linear]:
    if not isinstance(model, PeftModel):
        return {n: m for n, m in linear_layers(model).items() if n.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj"))}
    adapter, found = model.active_adapter, {}
    for name, layer in lora_layers(model).items():
        for side, part in (("A", layer.lora_A[adapter]), ("B", layer.lora_B[adapter])):
            if isinstance(part, nn.Linear):
                found[f"{name}.lora_{side}"] = part
    return found


def antidote(*, dense_ratio: float = 0.1, samples: int = 2000) -> Defence:
    """Antidote (ICML 2025, arXiv 2408.09600): zero the weights that matter most on harmful data.

    Importance is Wanda's |W_ij| * ||X_j||_2 over the harmful data; in every row the highest `dense_ratio` go. Under an
    adapter that is done to A and B, for full fine-tuning to the query, key and value weights, as in the released code.
    """
    within("dense_ratio", dense_ratio, 0, 1)
    whole_number("samples", samples)

    def finish(model: Model, context: Context) -> Model:
        harmful = required(context.harmful_data, "harmful_data", "antidote")
        layers, squares = _antidote_layers(model), dict[str, torch.Tensor]()
        if not layers:
            raise ValueError("antidote finds no query, key or value weights in this model")

        def take(name: str, inputs_NI: torch.Tensor) -> None:
            squares[name] = squares.get(name, torch.zeros(())) + inputs_NI.square().sum(0)

        read_inputs(model, layers, harmful, context, samples, take)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.mul_(keep_mask(layer.weight, squares[name].sqrt(), dense_ratio))
        return model

    return Defence(
        name="antidote",
        stage="after",
        source="Antidote, arXiv 2408.09600",
        differs=(
            "inputs are those of the whole fine-tuned model; the released code prunes on inputs of the layers one "
            "after the other, which are the same as it applies its masks last"
        ),
        needs=frozenset({"harmful_data"}),
        finish=finish,
    )


def inverse_factor(hessian_II: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper Cholesky factor U of H^-1 = U^T U, after dead inputs get 1 and the diagonal `damp` times its mean."""
    hessian_II = hessian_II.clone()
    diagonal = hessian_II.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II: torch.Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return factor_II


def chosen(delta_OI: torch.Tensor, factor_I: torch.Tensor, budget: float, never: float = 0.15) -> torch.Tensor:
    """Which entries of the change are kept: in the order of 1 / u_j^2 while the sum of delta^2 / u_j^2 is in budget.

    `factor_I`: the diagonal of U. `never`: the share at the end of the order that is not kept at any budget.
    """
    costs_OI = (1 / factor_I.square()).expand_as(delta_OI)
    order = costs_OI.flatten().argsort(stable=True)
    order = order[: len(order) - int(never * len(order))]
    spent = (delta_OI.square() * costs_OI).flatten()[order].cumsum(0)
    kept = torch.zeros(delta_OI.numel(), dtype=torch.bool, device=delta_OI.device)
    kept[order] = spent <= budget
    return kept.view_as(delta_OI)


def merged_delta(
    w0_OI: torch.Tensor, tuned_OI: torch.Tensor, factor_II: torch.Tensor, s: float, *, block: int = 2048, sub: int = 4
) -> torch.Tensor:
    """Weights with the affordable part of the change, the rest made good in the columns to the right.

    Follows the released code: the budget of a block is s / 2 * O / 4096 * mean of 1 / u_j^2.
    """
    w_OI = w0_OI.clone()
    rows, columns = w_OI.shape
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        now, tuned, u = w_OI[:, i1:i2].clone(), tuned_OI[:, i1:i2], factor_II[i1:i2, i1:i2]
        budget = float((1 / u.diagonal().square()).mean()) * s / 2 * rows / 4096
        kept = chosen(tuned - now, u.diagonal(), budget)
        result, errors = torch.zeros_like(now), torch.zeros_like(now)
        for j1 in range(0, i2 - i1, sub):
            j2 = min(j1 + sub, i2 - i1)
            result[:, j1:j2] = torch.where(kept[:, j1:j2], tuned[:, j1:j2], now[:, j1:j2])
            errors[:, j1:j2] = (now[:, j1:j2] - result[:, j1:j2]) / u.diagonal()[j1:j2]
            now[:, j2:] -= errors[:, j1:j2] @ u[j1:j2, j2:]
        w_OI[:, i1:i2] = result
        w_OI[:, i2:] -= errors @ factor_II[i1:i2, i2:]
    return w_OI


def safe_delta(*, s: float = 0.1, samples: int = 128, damp: float = 0.01) -> Defence:
    """Safe Delta (ICML 2025, arXiv 2505.12038, algorithm 1): keep only as much of the change as safety can bear.

    H = 2/n * sum x x^T over inputs of each layer of the *aligned* model on safe data; a weight of the change costs
    delta^2 / [H^-1]^2, and the cheapest are kept within the budget; what is kept is compensated as in OBS. All other
    weights are the aligned model's.
    """
    within("s", s, 0, float("inf"))
    within("damp", damp, 0, 1)
    whole_number("samples", samples)

    def finish(model: Model, context: Context) -> Model:
        whole: PreTrainedModel = merged(model)
        start: PreTrainedModel = required(context.start, "start", "safe_delta").to(whole.device)
        safe = required(context.safe_data, "safe_data", "safe_delta")
        before = linear_layers(start)
        layers, hessians = linear_layers(whole), dict[str, torch.Tensor]()

        def take(name: str, inputs_NI: torch.Tensor) -> None:
            hessians[name] = hessians.get(name, torch.zeros(())) + inputs_NI.T @ inputs_NI

        read_inputs(start, before, safe, context, samples, take)
        used = min(samples, len(safe))
        tuned = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        weights = dict(start.named_parameters())
        with torch.no_grad():
            for name, weight in whole.named_parameters():
                weight.copy_(weights[name])
            for name, layer in layers.items():
                factor_II = inverse_factor(2 / used * hessians[name], damp)
                w0_OI = before[name].weight.float()
                layer.weight.copy_(merged_delta(w0_OI, tuned[name].float(), factor_II, s))
        return whole

    return Defence(
        name="safe_delta",
        stage="after",
        source="Safe Delta, arXiv 2505.12038, algorithm 1",
        differs="rows are batched with padding left out of H; an adapter comes out merged into its base",
        needs=frozenset({"safe_data"}),
        keeps_start="always",
        finish=finish,
    )
