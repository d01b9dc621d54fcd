"""Loading models and tokenizers, the frozen reference, and batched generation.

Shape suffixes: B rows, L tokens of the padded batch, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

REFERENCE_KINDS: tuple[str, ...] = ("auto", "adapter_off", "copy")
Inputs = Mapping[str, torch.Tensor]
Conversation = Sequence[Mapping[str, Any]]


def load(
    name_or_path: str, *, revision: str = "main", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Errors: OSError from the library when the model cannot be found.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, revision=revision, dtype=dtype)
    return model.eval(), tokenizer


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, kw_only=True)
class AdapterOff:
    """The reference is the policy with its adapters disabled: no second model in memory."""

    kind = "adapter_off"

    def logits(self, policy: nn.Module, unwrapped: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Reference logits (B, L, V) without gradient."""
        if not isinstance(unwrapped, PeftModel):
            raise TypeError("adapter_off needs a PEFT model")
        with torch.no_grad(), evaluation_mode(policy), unwrapped.disable_adapter():
            logits: torch.Tensor = policy(**inputs, use_cache=False).logits
        return logits


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The reference is a model of its own: a frozen copy of the start, or one the caller gave."""

    model: nn.Module
    kind: str = "copy"

    def logits(self, policy: nn.Module, unwrapped: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Reference logits (B, L, V) without gradient."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits


Reference = AdapterOff | Frozen


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the original.

    TRL patches `forward` on the instance with a closure over the original model; a copied patch would run the
    original, so it is taken off.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__.pop("forward", None)
    return twin.eval().requires_grad_(False)


def make_reference(spec: str | nn.Module, model: nn.Module) -> Reference:
    """Build the frozen reference that `spec` names for a starting model.

    `auto`: `adapter_off` for a PEFT model, else `copy`. Errors: ValueError for an unknown name, for `adapter_off`
    without adapters, and for adapters that train biases, which stay trained when the adapters are off.
    """
    if isinstance(spec, nn.Module):
        return Frozen(model=spec.eval().requires_grad_(False), kind="model")
    if spec not in REFERENCE_KINDS:
        raise ValueError(f"unknown reference {spec!r}; known: {', '.join(REFERENCE_KINDS)}, or a model")
    if spec == "auto":
        spec = "adapter_off" if isinstance(model, PeftModel) else "copy"
    if spec == "copy":
        return Frozen(model=frozen_copy(model))
    if not isinstance(model, PeftModel):
        raise ValueError("reference='adapter_off' needs a PEFT model; give peft_config or use reference='copy'")
    for name, config in model.peft_config.items():
        bias = config.to_dict().get("bias", "none")
        if bias != "none":
            raise ValueError(
                f"adapter {name!r} trains biases (bias={bias!r}), which stay trained with adapters off; "
                "use bias='none' or reference='copy'"
            )
    return AdapterOff()


def verify_reference(reference: Reference, model: nn.Module, inputs: Inputs) -> None:
    """Check before training that the reference is the starting model and does not move when the policy moves.

    The policy's trainable weights (all of an adapter, else its smallest tensor) are disturbed for a moment.
    Errors: RuntimeError that says which check failed; ValueError for a reference with another vocabulary.
    """

    def policy_logits() -> torch.Tensor:
        with torch.no_grad(), evaluation_mode(model):
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    start_BLV, before_BLV = policy_logits(), reference.logits(model, model, inputs)
    if start_BLV.shape != before_BLV.shape:
        raise ValueError(f"the reference has {before_BLV.shape[-1]} logits per token, the model {start_BLV.shape[-1]}")
    if reference.kind != "model" and not torch.allclose(start_BLV, before_BLV, rtol=1e-4, atol=1e-4):
        raise RuntimeError(
            f"the {reference.kind} reference differs from the starting model (by up to "
            f"{(start_BLV - before_BLV).abs().max():.2g} in its logits); if the adapter was trained before, use "
            "reference='copy'"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise RuntimeError("no parameter of the model is trainable")
    if not isinstance(model, PeftModel):
        trainable = [min(trainable, key=lambda parameter: parameter.numel())]
    saved = [parameter.detach().clone() for parameter in trainable]
    with torch.no_grad():
        try:
            for parameter in trainable:
                parameter.add_(0.1)
            moved, after_BLV = policy_logits(), reference.logits(model, model, inputs)
        finally:
            for parameter, value in zip(trainable, saved, strict=True):
                parameter.copy_(value)
    if torch.equal(moved, start_BLV):
        raise RuntimeError("the model's output does not depend on its trainable parameters")
    if not torch.equal(after_BLV, before_BLV):
        raise RuntimeError(f"the {reference.kind} reference moves with the model: it is not frozen")


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts, batched by length.

    `progress` is called with (answered, total). Errors: ValueError for an empty conversation.
    """
    texts = [str(tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True)) for p in prompts]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not all(encoded):
        raise ValueError("a prompt has no tokens")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    with torch.inference_mode(), evaluation_mode(model):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            width = max(len(encoded[row]) for row in rows)
            ids = torch.tensor(
                [[pad] * (width - len(encoded[row])) + encoded[row] for row in rows], device=model.device
            )
            mask = torch.tensor(
                [[0] * (width - len(encoded[row])) + [1] * len(encoded[row]) for row in rows], device=model.device
            )
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
            progress(min(begin + batch_size, len(order)), len(order))
    return answers
