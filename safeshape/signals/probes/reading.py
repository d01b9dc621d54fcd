"""How a model reads a prompt: its tokens, and its hidden states pooled as they come, never all held at once.

Shape suffixes: B prompts, L tokens, D hidden states (layers), H hidden size.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message
from safeshape.store import canonical

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")
Side = Literal["right", "left"]
Prompt = str | Sequence[Message]  # a plain request, or a conversation that ends before the answer
_UNCHANGING = ("_name_or_path", "transformers_version", "architectures", "dtype")  # say nothing about the states


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model without its head, and its tokenizer. `blocks`: its layers in order. `depth`: how many hidden states."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: tuple[nn.Module, ...]
    hidden: int

    @property
    def depth(self) -> int:
        """Hidden states: the embedding (0), what each layer but the last gives, and the model's final state."""
        return len(self.blocks) + 1

    @property
    def chat(self) -> bool:
        """Whether prompts are rendered with a chat template; without one, the plain text is read."""
        return self.tokenizer.chat_template is not None

    def place(self, layer: int) -> int:
        """A layer's number from 0. Errors: ValueError for a layer that the model does not have."""
        if not -self.depth <= layer < self.depth:
            raise ValueError(f"the model has hidden states 0 to {self.depth - 1}; there is no layer {layer}")
        return layer % self.depth


def load_model(
    name_or_path: str, *, revision: str = "main", dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder or encoder without its head, and its tokenizer, in evaluation mode.

    Errors: OSError or ValueError from the library when the model cannot be found.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    model = AutoModel.from_pretrained(name_or_path, revision=revision, dtype=dtype)
    return model.to(device).eval(), tokenizer


def open_reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Find the layers of a loaded model.

    Errors: ValueError for a model whose layers cannot be told: encoder-decoders, and models that share their layers.
    """
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(f"a probe reads a decoder or an encoder, not an encoder-decoder ({type(model).__name__})")
    body = model.get_decoder() if model.can_generate() else model.base_model
    count = int(config.num_hidden_layers)
    stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise ValueError(f"cannot find the {count} layers of {type(model).__name__}")
    return Reader(model=body, tokenizer=tokenizer, blocks=tuple(stacks[0]), hidden=int(config.hidden_size))


def rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that is read: through the chat template with the generation prompt, or, without one, as it is.

    Without a chat template the contents of several messages are joined by a blank line.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise ValueError("the prompt is empty")
    if tokenizer.chat_template is None:
        return "\n\n".join(str(message["content"]) for message in messages)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def token_ids(prompts: Sequence[Prompt], reader: Reader) -> list[list[int]]:
    """Tokens of prompts. A chat template brings its own special tokens; plain text gets the tokenizer's.

    Errors: ValueError that numbers a prompt longer than the model reads, or without a token.
    """
    limit = int(reader.tokenizer.model_max_length)
    positions = reader.model.config.get_text_config().to_dict().get("max_position_embeddings")
    limit = limit if positions is None else min(limit, int(positions))
    texts = [rendered(prompt, reader.tokenizer) for prompt in prompts]
    ids: list[list[int]] = reader.tokenizer(texts, add_special_tokens=not reader.chat, verbose=False)["input_ids"]
    for index, one in enumerate(ids):
        if not one:
            raise ValueError(f"prompt {index} has no token")
        if len(one) > limit:
            raise ValueError(f"prompt {index} has {len(one)} tokens, the model reads {limit}")
    return ids


def pooled(states_LH: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector (H,) in float32 for the hidden states of a prompt: its last token's, or the mean over its tokens."""
    return states_LH[-1].float() if pooling == "last" else states_LH.float().mean(0)


def pooled_batch(states_BLH: torch.Tensor, mask_BL: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """The same for a padded batch, (B, H): padding on either side is left out."""
    if pooling == "last":
        places_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        last_B = (mask_BL * places_L).argmax(1)
        return states_BLH[torch.arange(len(mask_BL), device=mask_BL.device), last_B].float()
    # A product with the mask, not a where: nothing of the batch's size is copied in float32 for long.
    return torch.einsum("bl,blh->bh", mask_BL.to(states_BLH.dtype).float(), states_BLH.float()) / mask_BL.sum(
        1, keepdim=True
    )


@contextmanager
def taps(reader: Reader, layers: Sequence[int], take: Any) -> Iterator[None]:
    """While open, `take(layer, states_BLH)` is called with the input of each chosen layer as it arrives.

    `layers`: numbers from 0; the last hidden state is no layer's input and is not tapped.
    Differs: `output_hidden_states` keeps every chosen (B, L, H) until the forward ends; here each is pooled at once.
    """

    def tap(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            take(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    chosen = [layer for layer in dict.fromkeys(layers) if layer < reader.depth - 1]
    handles = [reader.blocks[layer].register_forward_pre_hook(tap(layer), with_kwargs=True) for layer in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_of(
    ids: Sequence[Sequence[int]], reader: Reader, side: Side = "right"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model is called with for one padded batch, and its mask (B, L).

    Padded on the left, positions are counted from the first real token, so that the states are the same.
    """
    width, device = max(len(one) for one in ids), reader.model.device
    gaps = [[0] * (width - len(one)) for one in ids]
    rows = [gap + list(one) if side == "left" else list(one) + gap for one, gap in zip(ids, gaps, strict=True)]
    marks = [
        gap + [1] * len(one) if side == "left" else [1] * len(one) + gap for one, gap in zip(ids, gaps, strict=True)
    ]
    mask_BL = torch.tensor(marks, device=device)
    inputs = {"input_ids": torch.tensor(rows, device=device), "attention_mask": mask_BL}
    if side == "left" and "position_ids" in signature(reader.model.forward).parameters:
        inputs["position_ids"] = (mask_BL.cumsum(1) - 1).clamp(min=0)
    return inputs, mask_BL


def states_of(
    ids: Sequence[Sequence[int]], reader: Reader, *, layers: Sequence[int], poolings: Sequence[Pooling], side: Side
) -> torch.Tensor:
    """Pooled hidden states of one batch, (B, poolings, chosen layers, H) in float32. `layers`: numbers from 0."""
    inputs, mask_BL = batch_of(ids, reader, side)
    found: dict[int, list[torch.Tensor]] = {}

    def take(layer: int, states_BLH: torch.Tensor) -> None:
        found[layer] = [pooled_batch(states_BLH, mask_BL, pooling) for pooling in poolings]

    # Some decoders keep keys and values unless told not to; encoders do not know the word.
    cache = {"use_cache": False} if "use_cache" in signature(reader.model.forward).parameters else {}
    with torch.inference_mode(), taps(reader, layers, take):
        last_BLH = reader.model(**inputs, **cache).last_hidden_state
        if reader.depth - 1 in layers:
            take(reader.depth - 1, last_BLH)
    return torch.stack([torch.stack([found[layer][p] for layer in layers], 1) for p in range(len(poolings))], 1)


def verify(reader: Reader) -> None:
    """Run one short prompt both ways: what the taps see must be the model's own `hidden_states`.

    Errors: ValueError for a model whose layers do not take the plain hidden state, or that ignores the mask.
    """
    ids = token_ids(["one two three"], reader)
    layers = range(reader.depth)
    seen = states_of(ids, reader, layers=layers, poolings=("last",), side="right")[0, 0]
    with torch.inference_mode():
        inputs, _ = batch_of(ids, reader)
        own = reader.model(**inputs, output_hidden_states=True).hidden_states
    if own is None or len(own) != reader.depth:
        raise ValueError(f"{type(reader.model).__name__} does not give {reader.depth} hidden states")
    for layer in layers:
        if not torch.allclose(seen[layer], own[layer][0, -1].float(), rtol=1e-3, atol=1e-3):
            raise ValueError(f"layer {layer} of {type(reader.model).__name__} does not read hidden state {layer}")


def weights_sha256(model: PreTrainedModel) -> str:
    """A hash of a model's parameters and shape: what its hidden states depend on, wherever it was loaded from."""
    digest = hashlib.sha256()
    config = model.config.get_text_config().to_dict()
    digest.update(canonical({k: repr(v) for k, v in config.items() if k not in _UNCHANGING}))
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.detach().contiguous().cpu()
        digest.update(f"{name}|{whole.dtype}|{tuple(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
