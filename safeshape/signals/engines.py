"""Where a scorer runs: in this process, or as Ray Data actors on a cluster.

Both give a scorer the same blocks of conversations, so that its batches, and with them the last bits of its scores, are
the same whoever scores them.
"""

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from safeshape.data import Message
from safeshape.signals.column import Engine, Scorer
from safeshape.types import Score, Span

Item = tuple[str, Sequence[Message]]
BLOCK = 64  # conversations that a scorer gets at once
_SHARD = 16  # blocks per file of a cluster's work, after the first few files, which hold one


def _blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    waiting = iter(items)
    while block := list(islice(waiting, size)):
        yield block


def local(scorer: Scorer, *, block: int | None = BLOCK) -> Engine:
    """The scorer in this process. `block` None: one endless stream, for scorers that wait for others, as a server."""

    def run(items: Iterable[Item]) -> Iterator[tuple[str, Score]]:
        if block is not None:
            for few in _blocks(items, block):
                scores = scorer([messages for _, messages in few])
                yield from zip((key for key, _ in few), scores, strict=True)
            return
        waiting: deque[str] = deque()

        def conversations() -> Iterator[Sequence[Message]]:
            for key, messages in items:
                waiting.append(key)
                yield messages

        for score in scorer(conversations()):
            yield waiting.popleft(), score

    return run


def on_ray(make: Callable[[], Scorer], *, actors: int, scratch: Path, gpus: float = 0.0, block: int = BLOCK) -> Engine:
    """The scorer in `actors` actors of Ray Data, each made by `make`, which must be picklable.

    What is to be scored goes as JSONL shards to `scratch`, a folder that every node of the cluster sees; scores come
    back to this process, which alone writes the store. `gpus`: of each actor. A running cluster is used where
    RAY_ADDRESS names one, else one is started here.
    Errors: ValueError where Ray is not installed, or a scorer fails as a whole.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine ray needs Ray Data: pip install 'safeshape[ray]'") from error

    def run(items: Iterable[Item]) -> Iterator[tuple[str, Score]]:
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            shards = _write_shards(items, scratch, block, 4 * actors)
            if shards:
                yield from _scored(ray, make, actors=actors, shards=shards, gpus=gpus)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    return run


def _write_shards(items: Iterable[Item], scratch: Path, block: int, small: int) -> list[str]:
    """Files with a block of conversations in each line; returns their paths.

    The first `small` files hold one block each, so that little work is spread over all actors too.
    """
    scratch.mkdir(parents=True)
    paths: list[str] = []
    blocks = _blocks(items, block)
    while shard := list(islice(blocks, 1 if len(paths) < small else _SHARD)):
        paths.append(str(scratch / f"{len(paths):09}.jsonl"))
        with Path(paths[-1]).open("w") as lines:
            for few in shard:
                lines.write(json.dumps([[key, list(map(dict, messages))] for key, messages in few]) + "\n")
    return paths


class _Actor:
    """Made once on every actor; then called with one shard at a time."""

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self.scorer = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        found = []
        for path in batch["shard"]:
            with Path(path).open() as lines:
                for line in lines:
                    items = json.loads(line)
                    scores = self.scorer([messages for _, messages in items])
                    found += [[key, asdict(score)] for (key, _), score in zip(items, scores, strict=True)]
        return {"scores": [json.dumps(found)]}


def _scored(
    ray: Any, make: Callable[[], Scorer], *, actors: int, shards: Sequence[str], gpus: float
) -> Iterator[tuple[str, Score]]:
    started = not ray.is_initialized()
    if started:
        # Ray's own tasks need a processor beside the actors', if only on paper: without it nothing would start.
        own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": actors + 1, "include_dashboard": False}
        ray.init(logging_level="ERROR", log_to_driver=False, **own)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        # Not `read_json`: Ray's readers join small files and infer types, and one shard shall be one piece of work.
        work = ray.data.from_items([{"shard": path} for path in shards], override_num_blocks=len(shards))
        results = work.map_batches(
            _Actor,
            fn_constructor_args=(make,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=gpus or None,
        )
        for row in results.iter_rows():
            for key, fields in json.loads(row["scores"]):
                spans = tuple(Span(**span) for span in fields.pop("spans"))
                yield key, Score(**fields, spans=spans)
    except ray.exceptions.RayError as error:
        raise ValueError(f"the scorer failed on the cluster: {' '.join(str(error).split())[-300:]}") from error
    finally:
        if started:
            ray.shutdown()
