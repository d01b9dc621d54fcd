"""Splits that keep whole groups together, and rows of the training part that nearly repeat a held-out one.

Shape suffix: B prompts.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer

Rows = NDArray[np.int64]
Labels = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Row numbers to fit on, and the rows that are held out."""

    fit: Rows
    held_out: Rows


def group_folds(labels: Labels, groups: Sequence[str] | None, *, folds: int = 5, seed: int = 0) -> list[Fold]:
    """Folds whose held-out part has both labels and, where there are groups, only groups that were not fitted on.

    The groups of each label are shuffled and dealt out in turn. A label with a single group (or no groups at all) has
    its rows dealt out instead. There are `folds` folds, or as many as a label has groups or rows, if that is fewer.
    Errors: ValueError when a label has fewer than two rows, or when a group has both labels.
    """
    rng = random.Random(f"folds/{seed}")
    dealt: list[list[list[int]]] = []
    seen: dict[str, bool] = {}
    for label in (True, False):
        rows = np.flatnonzero(labels == label).tolist()
        if len(rows) < 2:
            raise ValueError(f"cross-validation needs at least two {'harmful' if label else 'harmless'} prompts")
        parts: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            name = "" if groups is None else groups[row]
            if groups is not None and seen.setdefault(name, label) != label:
                raise ValueError(
                    f"group {name!r} holds harmful and harmless prompts; give each label groups of its own"
                )
            parts[name].append(row)
        pieces = [parts[name] for name in sorted(parts)] if len(parts) > 1 else [[row] for row in rows]
        rng.shuffle(pieces)
        dealt.append(pieces)
    count = min(folds, *(len(pieces) for pieces in dealt))
    found = []
    for number in range(count):
        held = sorted(row for pieces in dealt for piece in pieces[number::count] for row in piece)
        mask = np.zeros(len(labels), dtype=bool)
        mask[held] = True
        found.append(Fold(fit=np.flatnonzero(~mask), held_out=np.flatnonzero(mask)))
    return found


def split_share(strata: Sequence[str], *, share: float, seed: int) -> NDArray[np.bool_]:
    """A mask of the rows held out: `share` of each stratum, at least one of those with two rows or more."""
    rng = random.Random(f"split/{seed}")
    mask = np.zeros(len(strata), dtype=bool)
    places: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(strata):
        places[name].append(row)
    for name in sorted(places):
        rows = places[name]
        rng.shuffle(rows)
        mask[rows[: max(round(share * len(rows)), int(len(rows) > 1))]] = True
    return mask


def near_duplicates(texts: Sequence[str], of: Sequence[str], *, overlap: float = 0.8) -> NDArray[np.bool_]:
    """Which of `texts` share at least `overlap` of their words (Jaccard index of word sets) with one of `of`.

    Public sets borrow from one another: without this, a left-out data set would be partly trained on.
    """
    if not len(texts) or not len(of):
        return np.zeros(len(texts), dtype=bool)
    words = CountVectorizer(binary=True, token_pattern=r"\S+", dtype=np.float32)
    table = words.fit_transform([*texts, *of]).tocsr()
    left, right = table[: len(texts)], table[len(texts) :]
    shared = (left @ right.T).tocoo()
    left_size, right_size = np.asarray(left.sum(1)).ravel(), np.asarray(right.sum(1)).ravel()
    union = left_size[shared.row] + right_size[shared.col] - shared.data
    mask = np.zeros(len(texts), dtype=bool)
    mask[shared.row[shared.data >= overlap * union]] = True
    return mask
