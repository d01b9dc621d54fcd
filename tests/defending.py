"""Small defended runs for the tests, and a loop whose losses are plain functions of one weight."""

import torch
from conftest import conversation, tiny_model
from datasets import Dataset
from torch import nn
from training import config, rows

from safeshape.defences import Loop, run_defence

REFUSAL = "no no no"


def safe_rows(count=8, seed=5):
    return Dataset.from_list(
        [{"messages": [row["messages"][0], {"role": "assistant", "content": REFUSAL}]} for row in rows(count, seed)]
    )


def harmful_rows(count=8, seed=6):
    return Dataset.from_list([{"messages": row["messages"]} for row in rows(count, seed)])


def base_model():
    """The model before its alignment: the tiny model with every matrix moved a little."""
    model, seed = tiny_model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=seed))
    return model


def defend(folder, tokenizer, spec, *, model=None, data=None, settings=None, safe=None, harmful=None, **options):
    return run_defence(
        spec,
        tiny_model() if model is None else model,
        tokenizer,
        config(folder, **{"max_steps": 2, **(settings or {})}),
        train_dataset=Dataset.from_list(rows() if data is None else data),
        safe_data=safe_rows() if safe is None else safe,
        harmful_data=harmful_rows() if harmful is None else harmful,
        base=base_model(),
        **options,
    )


def loop_of(weight, *, user=None, safe=None, harmful=None, step=0, total=100):
    """A loop over one parameter `w`; `user`, `safe` and `harmful` are losses of it."""

    def run(loss):
        def one(*_):
            value = loss(weight)
            value.backward()
            return value.detach()

        return one

    losses = {"user": user, "safe": safe, "harmful": harmful}
    made = {name: run(loss) for name, loss in losses.items() if loss is not None}
    return Loop(
        model=nn.Module(), parameters={"w": weight}, step=step, total_steps=total,
        **{name: made.get(name, lambda *_: 1 / 0) for name in losses},
    )  # fmt: skip


def weight(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float32))


__all__ = ["REFUSAL", "base_model", "conversation", "defend", "harmful_rows", "loop_of", "safe_rows", "weight"]
