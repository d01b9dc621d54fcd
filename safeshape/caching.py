"""Writing the reference's final hidden states for a dataset, before training and in any number of processes.

Shape suffixes: N response tokens, H hidden size.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from safeshape.data import example_risk
from safeshape.models.head import Head, head_settings, read_head
from safeshape.models.reference import States, causal_model
from safeshape.models.states import SHARD_BYTES, Shard, StateCache, batches_by_length
from safeshape.types import IGNORE, MicroBatch

logger = logging.getLogger("safeshape")
BATCH_TOKENS = 4096  # of one forward while the states are written


@dataclass
class Numbered:
    """The datasets whose response tokens have places in the store. `streams`: whether one could not be numbered."""

    datasets: list[Dataset] = field(default_factory=list)
    tokens_per_row: list[int] = field(default_factory=list)
    streams: bool = False
    accepting: bool = True  # only datasets that are known from the start are stored

    def add(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The dataset with a `cache_index`; a stream as it is."""
        if isinstance(dataset, IterableDataset):
            self.streams = True
            return dataset
        numbered, tokens = index_tokens(dataset, sum(self.tokens_per_row))
        self.datasets.append(numbered)
        self.tokens_per_row += tokens
        return numbered


def index_tokens(dataset: Dataset, first: int) -> tuple[Dataset, list[int]]:
    """Number the response tokens of a dataset from `first` on, in a column `cache_index`; -1 for other tokens.

    Returns the dataset and the response tokens of each row. The column travels with the tokens, through truncation,
    packing, shuffling and padding.
    """
    tokens: list[int] = []
    for batch in dataset.select_columns(["labels"]).with_format("numpy").iter(batch_size=1000):
        tokens += [int((np.asarray(labels)[1:] != IGNORE).sum()) for labels in batch["labels"]]
    starts = [first, *(first + np.cumsum(tokens)).tolist()]

    def number(labels: list[int], row: int) -> dict[str, list[int]]:
        counted = np.array(labels) != IGNORE
        counted[0] = False
        return {"cache_index": np.where(counted, starts[row] + counted.cumsum() - 1, -1).tolist()}

    return dataset.map(number, with_indices=True, input_columns=["labels"], desc="Numbering response tokens"), tokens


def tokens_hash(datasets: Sequence[Dataset]) -> str:
    """SHA-256 over the tokens and labels of all rows in order: scores may change without the states."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for batch in dataset.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
            for values in (values for name in ("input_ids", "labels") for values in batch[name]):
                row = np.ascontiguousarray(values, dtype=np.int64)
                digest.update(len(row).to_bytes(8, "little"))
                digest.update(row.tobytes())
        digest.update(b"end")
    return digest.hexdigest()


def gathered(*parameters: nn.Parameter | None) -> AbstractContextManager[Any]:
    """Parameters made whole for a moment where ZeRO-3 has parted them already. Every process must enter it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([p for p in parameters if p is not None])
    return found


def model_hash(model: nn.Module, accelerator: Accelerator) -> str:
    """SHA-256 over the names and bytes of the weights the reference is made of: all, or those under an adapter.

    Computed by the main process, which may be the only one that has them; the same in every process.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if isinstance(model, PeftModel) and parameter.requires_grad:
            continue
        with gathered(parameter):
            if accelerator.is_main_process:
                digest.update(name.encode())
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return str(broadcast_object_list([digest.hexdigest()])[0])


def open_cache(
    folder: Path,
    model: nn.Module,
    *,
    numbered: Numbered,
    read: str,
    dtype: str,
    accelerator: Accelerator,
) -> StateCache:
    """The store for this data and this starting model; its own head, where training will move it, lies beside it.

    `read`: names what else is read in the pass. `dtype`: auto (the model's), float32, bfloat16 or float16. The same
    store in every process.
    """
    base = causal_model(model)
    name = str(base.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    hidden = int(base.config.get_text_config().hidden_size)
    made_from = (tokens_hash(numbered.datasets), model_hash(model, accelerator), read, name)
    key = hashlib.sha256(" ".join(made_from).encode()).hexdigest()
    cache = StateCache(
        folder, key=key, tokens_per_row=numbered.tokens_per_row, hidden=hidden, dtype=name, shard_bytes=SHARD_BYTES
    )
    if accelerator.is_main_process:
        cache.prepare()
    layer = base.get_output_embeddings()
    with torch.no_grad(), gathered(layer.weight, layer.bias):
        if accelerator.is_main_process and not isinstance(model, PeftModel) and cache.read_head() is None:
            head = read_head(base)
            bias = {} if head.bias_V is None else {"bias": head.bias_V}
            cache.write_head({"weight": head.weight_VH, **bias})
    accelerator.wait_for_everyone()
    return cache


def frozen_head(cache: StateCache, model: nn.Module, device: torch.device) -> Head | None:
    """The starting model's own head from the store; None where it stays frozen under an adapter."""
    if isinstance(model, PeftModel):
        return None
    stored = cache.read_head()
    if stored is None:
        raise OSError(f"no head is stored in {cache.folder}; all processes must see that folder")
    scale, softcap = head_settings(causal_model(model))
    bias = stored["bias"].to(device) if "bias" in stored else None
    return Head(weight_VH=stored["weight"].to(device), bias_V=bias, scale=scale, softcap=softcap)


def fill(
    cache: StateCache,
    datasets: Sequence[Dataset],
    *,
    collate: Callable[[list[dict[str, Any]]], MicroBatch],
    read: Callable[[MicroBatch], States],
    accelerator: Accelerator,
) -> None:
    """Compute and store the shards that are missing, shared out among the processes.

    `read`: the reference's states of a batch. Every process makes the same number of calls, as sharded
    models need. Errors: OSError when a shard is not there afterwards (the folder must be one that all processes see).
    """
    data = concatenate_datasets(list(datasets))
    lengths = [len(ids) for batch in data.select_columns(["input_ids"]).iter(1000) for ids in batch["input_ids"]]
    missing = cache.missing()
    accelerator.wait_for_everyone()
    if not missing:
        return
    if accelerator.is_main_process:
        logger.info("writing %.1f MB of reference states to %s", cache.bytes / 1e6, cache.folder)
    plans = {s.number: list(batches_by_length(range(s.first_row, s.last_row), lengths, BATCH_TOKENS)) for s in missing}
    shares = [missing[rank :: accelerator.num_processes] for rank in range(accelerator.num_processes)]
    calls = max(sum(len(plans[shard.number]) for shard in share) for share in shares)
    for shard in shares[accelerator.process_index]:
        cache.write(shard, *_states(cache, shard, plans[shard.number], data, collate, read))
        calls -= len(plans[shard.number])
    for _ in range(calls):
        read(collate([data[0]]))
    accelerator.wait_for_everyone()
    if cache.missing():
        raise OSError(
            f"{len(cache.missing())} shards are missing in {cache.folder}; all processes must see that folder"
        )


def _states(
    cache: StateCache,
    shard: Shard,
    plan: list[list[int]],
    data: Dataset,
    collate: Callable[[list[dict[str, Any]]], MicroBatch],
    read: Callable[[MicroBatch], States],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens = shard.end - shard.start
    states_NH, read_N, beside = torch.zeros(tokens, cache.hidden, dtype=cache.dtype), torch.zeros(tokens), False
    for rows in plan:
        batch = collate([data[row] for row in rows])
        if batch.cache_index_N is None:
            raise ValueError("the data carries no places in the store")
        found, here_N = read(batch), batch.cache_index_N.cpu() - shard.start
        states_NH[here_N] = found.hidden_NH.detach().to(cache.dtype).cpu()
        if found.read_N is not None:
            read_N[here_N], beside = found.read_N.detach().float().cpu(), True
    return states_NH, read_N if beside else None


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: where free space can be asked for."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def epochs_of(args: TrainingArguments, rows: int) -> float:
    """How often training reads each row; `rows` is 0 for a stream."""
    if args.max_steps <= 0 or rows == 0:
        return float(args.num_train_epochs)
    seen = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return float(seen / rows)


def stored_risk(cache: StateCache, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Risk of each example of a batch, from the scores that were read in the pass that wrote the states."""
    scores_BL, stored_BL = inputs["answer_p_safe"].clone(), inputs["cache_index"] >= 0
    scores_BL[stored_BL] = cache.beside(inputs["cache_index"][stored_BL]).to(scores_BL)
    return example_risk({**inputs, "answer_p_safe": scores_BL})
