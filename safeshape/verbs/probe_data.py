"""Labelled prompts from a user's files, or from the embedded world."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safeshape.config import PromptSet
from safeshape.signals.probes import Prompt
from safeshape.signals.probes.protocol import Labelled

_LABELS = {"harmful": True, "unsafe": True, "harmless": False, "safe": False}
_WORLD = 600  # requests of a kind, before a set is cut to size


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with its category, "" where there is none."""

    prompt: Prompt
    text: str
    category: str = ""


def text_of(prompt: Prompt) -> str:
    """The words of a prompt, without its system prompt and template."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message["content"]) for message in prompt if message["role"] != "system")


def prompt_of(row: Mapping[str, Any], column: str) -> Prompt:
    """The prompt in a row's column, or in `messages` where the row has no such column.

    Errors: ValueError in one sentence, without the row's number.
    """
    value = row.get(column, row.get("messages"))
    if value is None:
        raise ValueError(f"has no column {column!r}; it has: {', '.join(map(str, row))}")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{column} is empty")
        return value
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value):
        raise ValueError(f"{column} must be a text or a list of messages with role and content")
    messages = value[:-1] if value and value[-1]["role"] == "assistant" else value
    if not messages:
        raise ValueError(f"{column} has no message before the answer")
    return [dict(message) for message in messages]


def label_of(value: object, column: str) -> bool:
    """True where harmful. Errors: ValueError for anything that is not a label."""
    if isinstance(value, str) and value.lower() in _LABELS:
        return _LABELS[value.lower()]
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError(f"{column} must be true, 1, harmful or unsafe, or false, 0, harmless or safe, got {value!r}")


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file; leaves of nested JSON objects become rows of `prompt` and `category`.

    Errors: ValueError that names the file.
    """
    from safeshape.sources import open_source

    if path.suffix != ".json":
        yield from open_source(str(path)).rows()
        return
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, list):
        for index, row in enumerate(content):
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {index} is not a JSON object")
            yield row
        return
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a list of objects, or objects of lists of prompts")
    for category, inner in content.items():
        for prompt in _leaves(inner, path):
            yield {"prompt": prompt, "category": category}


def _leaves(value: object, path: Path) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value if isinstance(value, list) else value.values():
            yield from _leaves(inner, path)
    else:
        raise ValueError(f"{path} holds {value!r} where a prompt should be")


def read_set(entry: PromptSet, folder: Path) -> list[Request]:
    """The different prompts of one set, in order. Errors: ValueError that names the set and row."""
    if entry.path.startswith("world:"):
        return _world_set(entry)
    path = folder / entry.path
    found: dict[str, Request] = {}
    index = -1
    nested = path.suffix == ".json"
    for index, row in enumerate(rows_of(path)):
        try:
            for column in entry.where:
                if column not in row:
                    raise ValueError(f"has no column {column!r}; it has: {', '.join(map(str, row))}")
            if any(str(row[column]) != value for column, value in entry.where.items()):
                continue
            prompt = prompt_of(row, entry.field)
            if entry.category is not None and entry.category not in row:
                raise ValueError(f"has no column {entry.category!r}; it has: {', '.join(map(str, row))}")
            category = row.get("category", "") if entry.category is None and nested else row.get(entry.category or "")
            text = text_of(prompt)
            found.setdefault(text, Request(prompt=prompt, text=text, category=str(category or "")))
        except ValueError as error:
            raise ValueError(f"{entry.name}: row {index}: {error}") from error
    if not found:
        raise ValueError(f"{entry.name}: no row of {path} is taken")
    return list(found.values())


def _world_set(entry: PromptSet) -> list[Request]:
    from safeshape.world.language import KINDS, sample

    kind, _, part = entry.path.removeprefix("world:").partition("/")
    if kind not in KINDS or part not in ("", "held_out"):
        raise ValueError(
            f"{entry.name}: {entry.path} is no kind of request; known: {', '.join(KINDS)}, or KIND/held_out"
        )
    size = _WORLD
    while True:
        try:
            items = sample(kind, size, seed=1000, held_out=part == "held_out")
            break
        except ValueError:  # the world has fewer different requests of this kind
            size //= 2
    return [
        Request(prompt=item.prompt, text=item.prompt, category=item.category if item.kind == "harmful" else item.kind)
        for item in items
    ]


def labelled(entries: Sequence[PromptSet], folder: Path, *, most: int | None, seed: int) -> Labelled:
    """All sets as one, each cut to `most` prompts by the seed."""
    prompts: list[Prompt] = []
    texts, labels, datasets, families, categories, trains = [], [], [], [], [], []
    for entry in entries:
        taken = read_set(entry, folder)
        if most is not None and len(taken) > most:
            keep = sorted(random.Random(f"{entry.name}/{seed}").sample(range(len(taken)), most))
            taken = [taken[place] for place in keep]
        for request in taken:
            prompts.append(request.prompt)
            texts.append(request.text)
            labels.append(entry.label == "harmful")
            datasets.append(entry.name)
            families.append(entry.family or entry.name)
            categories.append(request.category)
            trains.append(entry.role == "train")
    return Labelled(
        prompts=prompts,
        texts=texts,
        labels=np.array(labels),
        datasets=datasets,
        families=families,
        categories=categories,
        trains=np.array(trains),
    )


def groups_of(data: Labelled) -> list[str]:
    """What is left out whole while something is chosen: data sets, or categories of a label with one set only."""
    single = {
        label
        for label in (True, False)
        if len(
            {
                n
                for n, kind, trains in zip(data.datasets, data.labels, data.trains, strict=True)
                if kind == label and trains
            }
        )
        == 1
    }
    return [
        f"{name}: {category}" if label in single and category else name
        for name, category, label in zip(data.datasets, data.categories, data.labels.tolist(), strict=True)
    ]


def described(data: Labelled) -> list[dict[str, Any]]:
    """What each set holds, with a hash of its prompts as they were used."""
    names = np.array(data.datasets)
    found = []
    for name in dict.fromkeys(data.datasets):
        rows = np.flatnonzero(names == name)
        whole = hashlib.sha256("\0".join(data.texts[row] for row in rows.tolist()).encode())
        found.append(
            {
                "name": name,
                "label": "harmful" if data.labels[rows[0]] else "harmless",
                "role": "train" if data.trains[rows[0]] else "test",
                "n": len(rows),
                "categories": len({data.categories[row] for row in rows.tolist()} - {""}),
                "sha256": whole.hexdigest(),
            }
        )
    return found


def from_rows(
    rows: Callable[[], Iterator[Mapping[str, Any]]], *, label_column: str, group_column: str | None, column: str
) -> tuple[list[Prompt], list[bool], list[str] | None, list[str]]:
    """Prompts, labels, groups and texts of rows that carry their own label. Errors: ValueError that names the row."""
    prompts: list[Prompt] = []
    labels, groups, texts = [], [], []
    for index, row in enumerate(rows()):
        try:
            for name in (label_column, *([group_column] if group_column else [])):
                if name not in row:
                    raise ValueError(f"has no column {name!r}; it has: {', '.join(map(str, row))}")
            prompt, label = prompt_of(row, column), label_of(row[label_column], label_column)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        prompts.append(prompt)
        labels.append(label)
        texts.append(text_of(prompt))
        if group_column:
            # A group that holds both labels would put its harmful half beside its harmless half: two groups.
            groups.append(f"{row[group_column]}/{'harmful' if label else 'harmless'}")
    return prompts, labels, groups if group_column else None, texts
