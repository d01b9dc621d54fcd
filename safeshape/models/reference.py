"""The frozen reference that risky tokens are held to: the base under an adapter, a copy, or its stored states.

Shape suffixes: B rows, L tokens of the padded batch, T = L - 1 predicted tokens, N response tokens, H hidden size,
V vocabulary.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from safeshape.models.head import Head, add_shaped_forward, project, read_head
from safeshape.models.loading import evaluation_mode
from safeshape.models.states import StateCache
from safeshape.types import MicroBatch

logger = logging.getLogger("safeshape")
REFERENCE_KINDS: tuple[str, ...] = ("auto", "adapter_off", "copy", "cached")


# What else is read from the states of every layer in the same pass: (hidden states of each layer BLH, batch) -> (N,).
Reader = Callable[[Sequence[torch.Tensor], MicroBatch], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class States:
    """Final hidden states (N, H) that predict the counted tokens, and what a reader made of all layers (N,)."""

    hidden_NH: torch.Tensor
    read_N: torch.Tensor | None = None


def states_of(model: nn.Module, batch: MicroBatch, reader: Reader | None = None) -> States:
    """One forward of a model that takes `shaped=`."""

    def take(_: PreTrainedModel, output: BaseModelOutputWithPast) -> dict[str, torch.Tensor]:
        last_BLH = output.last_hidden_state
        found = {"hidden": last_BLH[:, :-1][batch.counted_BT.to(last_BLH.device)]}
        return found if reader is None else {**found, "read": reader(output.hidden_states, batch)}

    more = {} if reader is None else {"output_hidden_states": True}
    found = model(**batch.forward, **more, shaped=take)
    return States(hidden_NH=found["hidden"], read_N=found.get("read"))


def counted_logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The model's own logits (N, V) for the counted tokens."""
    logits_NV: torch.Tensor = model(**batch.forward, use_cache=False).logits[:, :-1][batch.counted_BT]
    return logits_NV


@dataclass(frozen=True, kw_only=True)
class AdapterOff:
    """The reference is the policy with its adapters disabled: no second model in memory."""

    kind = "adapter_off"

    def logits(self, policy: nn.Module, unwrapped: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Reference logits (N, V) without gradient."""
        with torch.no_grad(), evaluation_mode(policy), _adapted(unwrapped).disable_adapter():
            return counted_logits(policy, batch)

    def states(
        self, policy: nn.Module, unwrapped: nn.Module, batch: MicroBatch, reader: Reader | None = None
    ) -> States:
        """Reference hidden states without gradient."""
        with torch.no_grad(), evaluation_mode(policy), _adapted(unwrapped).disable_adapter():
            return states_of(policy, batch, reader)

    def head(self, unwrapped: nn.Module, model: PreTrainedModel) -> Head:
        """The reference's head; `model` is the policy's base, inside its forward."""
        with _adapted(unwrapped).disable_adapter():
            return read_head(model)


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The reference is a model of its own: a frozen copy of the start, or one the caller gave."""

    model: nn.Module
    kind: str = "copy"

    def logits(self, policy: nn.Module, unwrapped: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Reference logits (N, V) without gradient."""
        with torch.no_grad():
            return counted_logits(self.model, batch)

    def states(
        self, policy: nn.Module, unwrapped: nn.Module, batch: MicroBatch, reader: Reader | None = None
    ) -> States:
        """Reference hidden states without gradient."""
        with torch.no_grad():
            return states_of(self.model, batch, reader)

    def head(self, unwrapped: nn.Module, model: PreTrainedModel) -> Head:
        """The reference's own head."""
        with torch.no_grad():
            return read_head(causal_model(self.model))


@dataclass(frozen=True, kw_only=True)
class Cached:
    """The reference's states were written to disk before training; the reference itself is gone.

    `frozen_head`: its head, where training moves the policy's; None where the policy's own is frozen under an adapter,
    which then also answers for rows that are not in the store.
    """

    cache: StateCache
    frozen_head: Head | None
    kind = "cached"
    live = AdapterOff()

    def logits(self, policy: nn.Module, unwrapped: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Reference logits (N, V) without gradient."""
        with torch.no_grad():
            states = self.states(policy, unwrapped, batch)
            return project(self.head(unwrapped, causal_model(unwrapped)), states.hidden_NH)

    def states(
        self, policy: nn.Module, unwrapped: nn.Module, batch: MicroBatch, reader: Reader | None = None
    ) -> States:
        """Reference hidden states, as stored. Errors: ValueError for rows without stored states."""
        if batch.cache_index_N is not None:
            read_N = None if reader is None else self.cache.beside(batch.cache_index_N)
            return States(hidden_NH=self.cache.gather(batch.cache_index_N), read_N=read_N)
        if self.frozen_head is not None:
            raise ValueError("the stored reference has no states for these rows; use reference='copy' to evaluate them")
        return self.live.states(policy, unwrapped, batch, reader)

    def head(self, unwrapped: nn.Module, model: PreTrainedModel) -> Head:
        """The reference's head."""
        return self.live.head(unwrapped, model) if self.frozen_head is None else self.frozen_head


Reference = AdapterOff | Frozen | Cached


@contextmanager
def answering(reference: Reference | None, model: nn.Module) -> Iterator[nn.Module]:
    """The model that answers as the reference; None: the model itself, which training has not moved yet.

    `model`: the policy, whose adapters are off inside. Errors: ValueError for stored states, which cannot answer.
    """
    if reference is None:
        yield model
    elif isinstance(reference, Frozen):
        yield reference.model
    elif isinstance(reference, Cached) and reference.frozen_head is not None:
        raise ValueError("stored states of a reference cannot answer a prompt")
    else:
        with _adapted(model).disable_adapter():
            yield model


def _adapted(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise TypeError("adapter_off needs a PEFT model")
    return model


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model under an adapter, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"{type(base).__name__} is not a transformers model")
    return base


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the original.

    TRL patches `forward` on the instance with a closure over the original model; a copied patch would run the
    original, so it is taken off.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__.pop("forward", None)
    return twin.eval().requires_grad_(False)


def choose_reference(
    spec: str | nn.Module, model: nn.Module, *, epochs: float, cache_bytes: int | None, free_bytes: int
) -> str | nn.Module:
    """Which kind of reference `auto` means; every other `spec` is returned as it is.

    `cached` where the states fit into half of the free disk and it saves something: for an adapter, with more than one
    epoch, the reference pass of all but the first; else, with at least one, the memory of a second model. Otherwise
    `adapter_off` for an adapter, `copy` for a full model. `cache_bytes`: None for a stream.
    Errors: ValueError for an unknown name, or `cached` for a stream.
    """
    if not isinstance(spec, str):
        return spec
    if spec not in REFERENCE_KINDS:
        raise ValueError(f"unknown reference {spec!r}; known: {', '.join(REFERENCE_KINDS)}, or a model")
    if spec == "cached" and cache_bytes is None:
        raise ValueError("reference='cached' needs a dataset with a length; a stream has none")
    if spec != "auto":
        return spec
    adapter = isinstance(model, PeftModel)
    if cache_bytes is not None and cache_bytes <= free_bytes // 2 and (epochs > 1 if adapter else epochs >= 1):
        return "cached"
    return "adapter_off" if adapter else "copy"


def make_reference(spec: str | nn.Module, model: nn.Module) -> Reference:
    """Build the live reference that `spec` names for a starting model: `adapter_off`, `copy` or a model.

    Errors: ValueError for `adapter_off` without adapters, and for adapters that train biases, which stay trained when
    the adapters are off.
    """
    if isinstance(spec, nn.Module):
        reference = Frozen(model=spec.eval().requires_grad_(False), kind="model")
        base = spec.get_base_model() if isinstance(spec, PeftModel) else spec
        if isinstance(base, PreTrainedModel):
            add_shaped_forward(base)
        return reference
    if spec == "copy":
        twin = frozen_copy(model)
        add_shaped_forward(causal_model(twin))
        return Frozen(model=twin)
    if not isinstance(model, PeftModel):
        raise ValueError("reference='adapter_off' needs a PEFT model; give peft_config or use reference='copy'")
    refuse_trained_biases(model)
    return AdapterOff()


def refuse_trained_biases(model: PeftModel) -> None:
    """Errors: ValueError for adapters that train biases, which stay trained with adapters off."""
    for name, config in model.peft_config.items():
        bias = config.to_dict().get("bias", "none")
        if bias != "none":
            raise ValueError(
                f"adapter {name!r} trains biases (bias={bias!r}), which stay trained with adapters off; "
                "use bias='none' or reference='copy'"
            )


def _close(a_NV: torch.Tensor, b_NV: torch.Tensor, stored: torch.dtype | None = None) -> bool:
    """Whether two sets of logits are equal to rounding of the lower of their precisions."""
    coarse = a_NV.dtype != torch.float32 or b_NV.dtype != torch.float32 or stored not in (None, torch.float32)
    tolerance = 3e-2 if coarse else 1e-4
    largest = a_NV.abs().max().clamp(min=1e-3)
    return bool(((a_NV.float() - b_NV.float()).abs().max() <= tolerance * largest).item())


def verify_head(model: nn.Module, batch: MicroBatch) -> str | None:
    """Why the head that was read does not give the model's own logits; None where it does."""
    try:
        with torch.no_grad(), evaluation_mode(model):
            own_NV = counted_logits(model, batch)

            def shaped(causal: PreTrainedModel, output: BaseModelOutputWithPast) -> dict[str, torch.Tensor]:
                return {"logits": project(read_head(causal), output.last_hidden_state[:, :-1][batch.counted_BT])}

            read_NV = model(**batch.forward, shaped=shaped)["logits"]
    except (ValueError, AttributeError, TypeError) as error:
        return f"the output layer cannot be read: {error}"
    if own_NV.shape != read_NV.shape or not _close(own_NV, read_NV):
        return "the output layer as read does not give the model's own logits"
    return None


def settled_head(loss_head: str, model: nn.Module, batch: MicroBatch) -> str:
    """What `loss_head` ("auto", "fused", "dense") means for a model: "fused" or "dense".

    Errors: RuntimeError for "fused" where the head that was read is not the model's.
    """
    problem = None if loss_head == "dense" else verify_head(model, batch)
    if problem is not None and loss_head == "fused":
        raise RuntimeError(problem)
    if problem is not None:
        logger.warning("full logits are built, because %s", problem)
    return "fused" if problem is None and loss_head != "dense" else "dense"


def verify_reference(
    reference: Reference,
    model: nn.Module,
    batch: MicroBatch,
    unwrapped: nn.Module,
    vocabulary: int,
    *,
    disturb: bool = True,
) -> None:
    """Check before training that the reference is the starting model and does not move when the policy moves.

    `model` is what is run, `unwrapped` the model in it; `vocabulary`: tokens of the tokenizer, which both must know.
    With `disturb`, the policy's trainable weights (all of an adapter, else its smallest tensor) are moved for a moment.
    Errors: RuntimeError that says which check failed; ValueError for a reference with another vocabulary.
    """

    def policy_logits() -> torch.Tensor:
        with torch.no_grad(), evaluation_mode(model):
            return counted_logits(model, batch)

    if isinstance(reference, Frozen) and isinstance(reference.model, PreTrainedModel):
        known = int(reference.model.get_input_embeddings().num_embeddings)
        if known < vocabulary:
            raise ValueError(f"the reference knows {known} tokens, the tokenizer {vocabulary}")
    start_NV, before_NV = policy_logits(), reference.logits(model, unwrapped, batch)
    stored = reference.cache.dtype if isinstance(reference, Cached) else None
    if reference.kind != "model" and not _close(start_NV, before_NV, stored):
        raise RuntimeError(
            f"the {reference.kind} reference differs from the starting model (by up to "
            f"{(start_NV - before_NV).abs().max():.2g} in its logits); if the adapter was trained before, use "
            "reference='copy'"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise RuntimeError("no parameter of the model is trainable")
    if not disturb:
        return
    if not isinstance(unwrapped, PeftModel):
        trainable = [min(trainable, key=lambda parameter: parameter.numel())]
    with torch.no_grad(), _disturbed(trainable):
        moved_NV, after_NV = policy_logits(), reference.logits(model, unwrapped, batch)
    if torch.equal(moved_NV, start_NV):
        raise RuntimeError("the model's output does not depend on its trainable parameters")
    if not torch.equal(after_NV, before_NV):
        raise RuntimeError(f"the {reference.kind} reference moves with the model: it is not frozen")


@contextmanager
def _disturbed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Trainable weights moved by 0.1, and put back bit for bit."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.add_(0.1)
        yield
    finally:
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
