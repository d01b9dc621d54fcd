"""Labelled prompts, and the ways to leave some of them out. Shape suffix: B prompts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from safeshape.signals.probes.folds import Labels, Rows, near_duplicates, split_share
from safeshape.signals.probes.reading import Prompt

TEST_SHARE = 0.3
SMALLEST_CATEGORY = 15  # prompts; an AUROC of fewer says nothing
Kind = Literal["in distribution", "data set left out", "test set", "category left out"]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Prompts with labels, one entry each per prompt.

    `texts`: the words alone, for the control. `datasets`: where each comes from. `families`: data sets of one family
    are left out together. `categories`: "" where there are none. `trains`: False for sets that are only tested on.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    labels: Labels
    datasets: Sequence[str]
    families: Sequence[str]
    categories: Sequence[str]
    trains: Labels


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One measurement. `fit`: rows that may be looked at; `asked`: rows that are scored; `own`: those of the name.

    `dropped`: rows kept from fitting because they nearly repeat a scored one. `like`: the unit whose choice of layers
    and C is used, where a unit makes none of its own.
    """

    name: str
    kind: Kind
    fit: Rows
    asked: Rows
    own: Rows
    dropped: int
    like: str | None = None


def units(data: Labelled, *, seed: int = 0) -> Iterator[Unit]:
    """Every measurement: in distribution, each family left out, each test-only family, each category left out.

    A family with one label is scored against held-out prompts of the other label from the sets that stay: 30 % of
    each, never fitted on. Near duplicates of scored prompts are dropped from the rows to fit on. What would leave fewer
    than two prompts of a label to fit on or to score is left out.
    """
    strata = [f"{name}/{label}" for name, label in zip(data.datasets, data.labels, strict=True)]
    held = split_share(strata, share=TEST_SHARE, seed=seed) & data.trains
    yield _unit(data, "in distribution", "in distribution", held, held)
    yield from (unit for unit in _left_out(data, held) if _enough(data, unit))


def _left_out(data: Labelled, held: Labels) -> Iterator[Unit]:
    families, datasets = np.array(data.families), np.array(data.datasets)
    categories = np.array(data.categories)
    for family in dict.fromkeys(data.families):
        own = families == family
        kind: Kind = "data set left out" if data.trains[own].all() else "test set"
        yield _unit(data, family, kind, own, own | _counterpart(data, own, held & ~own))
    for name in dict.fromkeys(data.datasets):
        mine = (datasets == name) & data.trains
        counts = Counter(categories[mine].tolist())
        wanted = [c for c, n in counts.items() if c and n >= SMALLEST_CATEGORY]
        for category in wanted if len(counts) > 1 else []:
            own = mine & (categories == category)
            family = str(families[mine][0])
            # A family with both labels is scored against itself, so its choice may have seen this one's counterpart.
            alone = len(set(data.labels[families == family].tolist())) > 1
            asked = own | _counterpart(data, own, held & ~own)
            yield _unit(data, f"{name}: {category}", "category left out", own, asked, None if alone else family)


def _enough(data: Labelled, unit: Unit) -> bool:
    return all((data.labels[rows] == kind).sum() > 1 for rows in (unit.fit, unit.asked) for kind in (True, False))


def _counterpart(data: Labelled, own: Labels, held: Labels) -> Labels:
    """The held-out rows of the label that `own` lacks; nothing where it has both."""
    present = set(data.labels[own].tolist())
    return held & (data.labels != present.pop()) if len(present) == 1 else np.zeros_like(held)


def _unit(data: Labelled, name: str, kind: Kind, own: Labels, asked: Labels, like: str | None = None) -> Unit:
    fit = np.flatnonzero(data.trains & ~asked)
    texts = np.array(data.texts, dtype=object)
    copies = near_duplicates(texts[fit].tolist(), texts[asked].tolist())
    return Unit(
        name=name,
        kind=kind,
        fit=fit[~copies],
        asked=np.flatnonzero(asked),
        own=np.flatnonzero(own),
        dropped=int(copies.sum()),
        like=like,
    )
