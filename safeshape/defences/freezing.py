"""SPPFT: the layers that hold refusals are not trained."""

import re

from torch import nn

from safeshape.defences.records import Context, Defence

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def safety_layers(count: int, first: int | None, last: int | None) -> range:
    """Which layers stay as they are, `last` included; by default layers 5 to 14 of 32, in proportion to the depth."""
    first = round(5 / 32 * count) if first is None else first
    last = round(15 / 32 * count) - 1 if last is None else last
    if not 0 <= first <= last < count:
        raise ValueError(f"the layers {first} to {last} are not among those of a model with {count}")
    return range(first, last + 1)


def layer_of(parameter: str) -> int | None:
    """The number of the decoder layer that a parameter belongs to, by its name; None outside of all."""
    found = _LAYER.search(f".{parameter}.")
    return None if found is None else int(found.group(1))


def sppft(*, first: int | None = None, last: int | None = None) -> Defence:
    """Safety layers (ICLR 2025, arXiv 2408.17003): fine-tuning with the contiguous middle layers frozen.

    `first`, `last`: numbers of the frozen layers from 0 on, both included. The reference code freezes 5 to 14 of
    Llama 2's 32; other depths take the same share.
    """
    for name, value in (("first", first), ("last", last)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")

    def freeze(model: nn.Module, context: Context) -> None:
        numbers = [number for name, _ in model.named_parameters() if (number := layer_of(name)) is not None]
        if not numbers:
            raise ValueError("sppft finds no numbered layers in this model")
        frozen = safety_layers(max(numbers) + 1, first, last)
        for name, parameter in model.named_parameters():
            if layer_of(name) in frozen:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("sppft would freeze every trained weight; choose fewer layers")

    return Defence(
        name="sppft",
        stage="fine-tuning",
        source="SPPFT, arXiv 2408.17003",
        differs="the layers are a share of the depth, not found by the paper's cosine analysis of each model",
        freeze=freeze,
    )
