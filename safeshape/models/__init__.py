"""Loading models, the frozen reference, the head of the policy, and batched generation."""

from safeshape.models.generation import Sampling, generate, generate_batches
from safeshape.models.head import Head, add_shaped_forward, project, read_head
from safeshape.models.loading import evaluation_mode, load
from safeshape.models.reference import (
    AdapterOff,
    Cached,
    Frozen,
    Reference,
    choose_reference,
    make_reference,
    settled_head,
    verify_head,
    verify_reference,
)
from safeshape.models.states import StateCache

__all__ = [
    "AdapterOff",
    "Cached",
    "Frozen",
    "Head",
    "Reference",
    "Sampling",
    "StateCache",
    "add_shaped_forward",
    "choose_reference",
    "evaluation_mode",
    "generate",
    "generate_batches",
    "load",
    "make_reference",
    "project",
    "read_head",
    "settled_head",
    "verify_head",
    "verify_reference",
]
