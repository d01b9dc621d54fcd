"""A scorer from the settings of `safeshape score`: one guard or several, in this process or behind a server.

Everything that makes its scores is gathered here too, as the part of the store's keys that tells one scorer from
another: how the guard is asked, its weights, and every setting that changes a score.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer

from safeshape.client import Client
from safeshape.config.score import ScoreConfig
from safeshape.data import Message
from safeshape.signals.chunks import Unit
from safeshape.signals.column import Scorer
from safeshape.signals.ensembles import Ensemble, load_scorer
from safeshape.signals.guard_rows import row_of
from safeshape.signals.guards import Guard, load_guard
from safeshape.signals.refine import Refine, RefineReport
from safeshape.signals.server import ServerGuard
from safeshape.types import Score

_PARTS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
_ROW = re.compile(r"^row \d+: ")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A scorer with what it is. `scorer`: as it stands in the scored data. `maker`: everything that makes a score.

    `server`: the guard behind a server, where there is one. `refined`: what refining saved, where it was asked for.
    """

    score: Scorer
    scorer: dict[str, Any]
    maker: dict[str, Any]
    server: ServerGuard | None = None
    refined: RefineReport | None = None


def fingerprint(model: str, revision: str, *, file: str = "config.json") -> str:
    """What a model's files hold: a hash over a folder's files, or the commit of a Hub id.

    `file`: one that the Hub repository surely has. Errors: OSError or ValueError from the library for an unknown id.
    """
    folder = Path(model)
    if not folder.is_dir():
        return Path(hf_hub_download(model, file, revision=revision)).parent.name
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _PARTS and path.is_file():
            with path.open("rb") as content:
                whole.update(f"{path.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _with_weights(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity with the hash of the weights in place of their path: a moved folder is still the same guard."""
    found = dict(identity)
    if "members" in found:
        found["members"] = [_with_weights(member) for member in found["members"]]
    else:
        found["model"] = fingerprint(found["model"], found["revision"])
    return found


def open_scorer(config: ScoreConfig, sources: Sequence[str | None]) -> Opened:
    """Load what the settings ask for. `sources`: where each guard's weights are, None for the row's own.

    Errors: ValueError in one sentence.
    """
    if config.server is not None:
        return _open_server(config)
    unit: Unit = config.unit
    options: dict[str, Any] = {"revision": config.revision, "dtype": config.dtype, "device": config.device}
    options["sharpen"] = True if config.sharpen else None
    if len(config.guard) == 1:
        guard = load_scorer(config.guard[0], model=sources[0], **options)
    else:
        pairs = zip(config.guard, sources, strict=True)
        guard = Ensemble(members=tuple(load_guard(g, model=s, **options) for g, s in pairs), how=config.combine)
    settings: dict[str, Any] = {"chunk": config.chunk, "unit": unit, "batch_size": config.batch_size}
    scorer, report = guard.identity(config.chunk, unit), None
    if isinstance(guard, Guard):
        refine = Refine(tolerance=config.tolerance) if config.refine else None
        report = RefineReport() if config.refine else None
        scorer = guard.identity(config.chunk, unit, refine)
        settings |= {"refine": refine or False, "report": report, "on_error": "keep"}
    elif config.refine:
        raise ValueError("refine is for a single guard with label tokens")

    def score(conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        return guard.score_many(conversations, **settings)

    maker = {"scorer": _with_weights(scorer), "dtype": config.dtype}
    return Opened(score=one_by_one(score, scorer), scorer=scorer, maker=maker, refined=report)


def make_scorer(config: ScoreConfig, sources: Sequence[str | None]) -> Scorer:
    """The scorer alone: what an actor on a cluster makes."""
    return open_scorer(config, sources).score


def _open_server(config: ScoreConfig) -> Opened:
    unit, revision = config.unit, config.revision or "main"
    name, row = row_of(config.guard[0])
    tokenizer = AutoTokenizer.from_pretrained(str(config.tokenizer), revision=revision)
    client = Client(
        str(config.server),
        model=str(config.server_model),
        concurrency=config.concurrency,
        timeout_s=config.timeout,
        retries=config.retries,
        key_variable=config.api_key_variable,
    )
    guard = ServerGuard(
        client, name=name, row=row, tokenizer=tokenizer, revision=revision, top_logprobs=config.top_logprobs
    )
    try:
        served = guard.check()
    except ValueError:
        client.close()
        raise
    scorer = guard.identity(config.chunk, unit)
    # What servers tell of the weights themselves: vLLM their path, llama.cpp their size. The rest changes by the hour.
    told = {key: served[key] for key in ("root", "parent", "meta") if served.get(key) is not None}
    files = fingerprint(str(config.tokenizer), revision, file="tokenizer_config.json")
    maker = {"scorer": scorer, "served": told, "tokenizer": files, "top_logprobs": config.top_logprobs}

    def score(conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        return guard.score_many(conversations, chunk=config.chunk, unit=unit, on_error="keep")

    return Opened(score=score, scorer=scorer, maker=maker, server=guard)


def one_by_one(scorer: Scorer, identity: Mapping[str, Any]) -> Scorer:
    """A scorer that gives a failure as a score with its reason, whatever kind of guard it is made of.

    A row that a guard refuses, or whose answer outgrows the device's memory, is scored alone; the others go on
    together. `identity`: what stands in the score of a failed row.
    """

    def score(conversations: Iterable[Sequence[Message]]) -> Iterator[Score]:
        waiting = list(conversations)
        while waiting:
            done = 0
            try:
                for found in scorer(waiting):
                    done += 1
                    yield found
                return
            except (ValueError, torch.OutOfMemoryError):
                if done == len(waiting):
                    raise
                yield _alone(scorer, waiting[done], identity)
            waiting = waiting[done + 1 :]

    return score


def _alone(scorer: Scorer, messages: Sequence[Message], identity: Mapping[str, Any]) -> Score:
    try:
        return next(iter(scorer([messages])))
    except ValueError as error:
        reason = _ROW.sub("", " ".join(str(error).split()))
    except torch.OutOfMemoryError:
        reason = "the answer is too long for the memory of the device"
    return Score(signal="star", p_safe=None, scorer=dict(identity), error=reason)
