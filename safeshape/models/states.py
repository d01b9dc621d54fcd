"""The reference's final hidden states on disk, written once: exact to the stored precision, no reference afterwards.

One state per response token, in shards of whole rows. Shape suffixes: N response tokens, H hidden size.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows [first_row, last_row) of the data and the states [start, end) of their response tokens."""

    number: int
    first_row: int
    last_row: int
    start: int
    end: int


def split_into_shards(tokens_per_row: Sequence[int], bytes_per_token: int, shard_bytes: int) -> tuple[Shard, ...]:
    """Consecutive rows, as many to a shard as fit into `shard_bytes`, at least one."""
    shards: list[Shard] = []
    first, start, end = 0, 0, 0
    for row, tokens in enumerate(tokens_per_row):
        if end > start and (end + tokens - start) * bytes_per_token > shard_bytes:
            shards.append(Shard(number=len(shards), first_row=first, last_row=row, start=start, end=end))
            first, start = row, end
        end += tokens
    if end > start:
        last = len(tokens_per_row)
        shards.append(Shard(number=len(shards), first_row=first, last_row=last, start=start, end=end))
    return tuple(shards)


class StateCache:
    """A folder of memory-mapped shards. `key` names what the states were computed from: data, model, precision.

    Errors: ValueError for an unknown precision; OSError, before anything is written, when the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str,
        tokens_per_row: Sequence[int],
        hidden: int,
        dtype: str,
        shard_bytes: int,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"cache_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.folder, self.key, self.hidden, self.dtype = folder / key[:32], key, hidden, DTYPES[dtype]
        self.tokens_per_row = tokens_per_row
        self.shards = split_into_shards(tokens_per_row, hidden * self.dtype.itemsize, shard_bytes)
        self._ends = np.array([shard.end for shard in self.shards])
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Size on disk when complete, without file headers."""
        return sum(self.tokens_per_row) * self.hidden * self.dtype.itemsize

    def path(self, shard: Shard) -> Path:
        """Where a shard is or will be."""
        return self.folder / f"states-{shard.number:05}.safetensors"

    def missing(self) -> list[Shard]:
        """The shards that are not there yet; a shard appears whole or not at all."""
        return [shard for shard in self.shards if not self.path(shard).is_file()]

    def prepare(self) -> None:
        """Make the folder and see that what is missing fits on the disk."""
        needed = sum(s.end - s.start for s in self.missing()) * self.hidden * self.dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"the reference's states need {needed:,} bytes in {self.folder}, {free:,} are free")
        about = {"key": self.key, "tokens": sum(self.tokens_per_row), "hidden": self.hidden, "dtype": str(self.dtype)}
        _write_whole(self.folder / "states.json", lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))

    def write(self, shard: Shard, states_NH: torch.Tensor, read_N: torch.Tensor | None = None) -> None:
        """Store the states of one shard, and one number a token that was read from other layers in the same pass.

        Errors: ValueError when their number is not the shard's.
        """
        if states_NH.shape != (shard.end - shard.start, self.hidden):
            raise ValueError(f"shard {shard.number} holds {shard.end - shard.start} states of {self.hidden} channels")
        tensors = {"states": states_NH.to(self.dtype).cpu().contiguous()}
        if read_N is not None:
            tensors["read"] = read_N.float().cpu().contiguous()
        _write_whole(self.path(shard), lambda path: save_file(tensors, path))

    def write_head(self, tensors: dict[str, torch.Tensor]) -> None:
        """Store the reference's own head beside its states."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _write_whole(self.folder / "head.safetensors", lambda path: save_file(whole, path))

    def read_head(self) -> dict[str, torch.Tensor] | None:
        """The stored head, or None."""
        path = self.folder / "head.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def gather(self, index_N: torch.Tensor) -> torch.Tensor:
        """The states (N, H) at these places, on the index's device; only their pages are read from the disk."""
        return self._select("states", index_N)

    def beside(self, index_N: torch.Tensor) -> torch.Tensor:
        """What was read in the same pass for the tokens at these places, (N,). Errors: KeyError where nothing was."""
        return self._select("read", index_N)

    def _select(self, name: str, index_N: torch.Tensor) -> torch.Tensor:
        places = index_N.cpu().numpy()
        numbers = np.searchsorted(self._ends, places, side="right")
        parts, order = [], []
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            local = torch.from_numpy(places[here] - self.shards[number].start)
            parts.append(self._mapped(int(number))[name].index_select(0, local))
            order.append(here)
        if not parts:
            return torch.empty(0, self.hidden, dtype=self.dtype, device=index_N.device)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return torch.cat(parts)[back].to(index_N.device)

    def _mapped(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._open:
            with safe_open(self.path(self.shards[number]), framework="pt") as file:
                self._open[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._open[number]

    def remove(self) -> None:
        """Delete the states, and the folder around them if nothing else is in it."""
        self._open.clear()
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def _write_whole(path: Path, write: Any) -> None:
    """Write beside the place and rename, so that a kill leaves either nothing or all of it."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def batches_by_length(rows: Iterable[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows grouped so that each padded batch holds at most `max_tokens` tokens, or one row."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
