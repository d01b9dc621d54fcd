"""Features of prompts: pooled hidden states, streamed in windows, kept in the store, bounded in memory.

Shape suffixes: B prompts, P poolings over tokens, D layers, H hidden size, F features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.signals.probes.reading import (
    POOLINGS,
    Pooling,
    Prompt,
    Reader,
    Side,
    open_reader,
    states_of,
    token_ids,
    weights_sha256,
)
from safeshape.store import Store, content_key

Features = NDArray[np.float32]
LayerPooling = Literal["concat", "mean", "learned"]
LAYER_POOLINGS: tuple[LayerPooling, ...] = ("concat", "mean", "learned")
Progress = Callable[[int, int], None]
WINDOW = 512  # prompts tokenised, looked up and read together


def features(
    prompts: Sequence[Prompt],
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    pooling: Pooling = "last",
    layer_pooling: LayerPooling = "concat",
    batch_size: int = 64,
    padding_side: Side = "right",
    store: Store | None = None,
    progress: Progress = lambda done, total: None,
) -> Features:
    """Features of prompts, shape (B, F): the chosen layers side by side, or with `layer_pooling="mean"` their mean.

    A prompt is rendered with the generation prompt, so that its last token is the one from which the first answer token
    is predicted; where the tokenizer has no chat template the plain text is read with the tokenizer's special tokens,
    and the last token is whatever ends it ([SEP] for BERT: every token of an encoder has seen the whole prompt, and
    on public prompts this one did better than [CLS]). Layer 0 is the embedding, -1 the last layer.
    Errors: ValueError for a layer the model does not have, an unknown pooling, or no prompts.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be last or mean, got {pooling!r}")
    reader = open_reader(model, tokenizer)
    found_BPDH = extract(
        prompts,
        reader,
        layers=layers,
        poolings=(pooling,),
        mean_layers=layer_pooling == "mean",
        batch_size=batch_size,
        padding_side=padding_side,
        store=store,
        progress=progress,
    )
    return found_BPDH.reshape(len(prompts), -1)


def extract(
    prompts: Sequence[Prompt],
    reader: Reader,
    *,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    mean_layers: bool = False,
    batch_size: int = 64,
    padding_side: Side = "right",
    store: Store | None = None,
    progress: Progress = lambda done, total: None,
) -> Features:
    """Pooled hidden states (B, P, D, H), D = 1 with `mean_layers`; the one array that grows with the prompts.

    Features in the store are found by the prompt's tokens, the model's weights and the settings; what is missing is
    read in batches of similar length and put there window by window.
    """
    if not prompts:
        raise ValueError("there are no prompts")
    if not layers:
        raise ValueError("there are no layers")
    places = [reader.place(layer) for layer in layers]
    shape = (len(poolings), 1 if mean_layers else len(layers), reader.hidden)
    found = np.empty((len(prompts), *shape), dtype=np.float32)
    settings = {"places": places, "poolings": list(poolings), "mean_layers": mean_layers}
    maker = None if store is None else {"features": 1, "weights": weights_sha256(reader.model), **settings}
    for begin in range(0, len(prompts), WINDOW):
        try:
            ids = token_ids(prompts[begin : begin + WINDOW], reader)
        except ValueError as error:
            raise ValueError(f"{error} (counted from prompt {begin})" if begin else str(error)) from error
        keys = [] if maker is None else [content_key(one, maker) for one in ids]
        there = {} if store is None else store.get_bytes("features", keys)
        for row, key in enumerate(keys):
            if key in there:
                found[begin + row] = np.frombuffer(there[key], dtype=np.float32).reshape(shape)
        missing = [row for row in range(len(ids)) if not keys or keys[row] not in there]
        for rows, batch in _read(ids, missing, reader, places, poolings, mean_layers, batch_size, padding_side):
            found[[begin + row for row in rows]] = batch
        if store is not None and missing:
            data = {keys[row]: found[begin + row].tobytes() for row in missing}
            store.put_many("features", {key: {"shape": list(shape)} for key in data}, data)
        progress(min(begin + WINDOW, len(prompts)), len(prompts))
    return found


def _read(
    ids: Sequence[Sequence[int]],
    missing: Sequence[int],
    reader: Reader,
    places: Sequence[int],
    poolings: Sequence[Pooling],
    mean_layers: bool,
    batch_size: int,
    side: Side,
) -> Iterator[tuple[Sequence[int], Any]]:
    """Rows of a window and their states, in batches of similar length."""
    order = sorted(missing, key=lambda row: len(ids[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        states_BPDH = states_of([ids[row] for row in rows], reader, layers=places, poolings=poolings, side=side)
        if mean_layers:
            states_BPDH = states_BPDH.mean(2, keepdim=True)
        yield rows, states_BPDH.cpu().numpy()
