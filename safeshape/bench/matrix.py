"""A matrix file to cells. Lists multiply; cells that several experiments share are run once."""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from safeshape.store import canonical

AXES = ("model", "attack", "defence", "seed")
_VERSION = version("safeshape")
Spec = Mapping[str, Any]  # a name and its parameters: {"name": "mixed", "ratio": 0.05}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its evaluation. `settings`: everything beside the four axes that changes the result."""

    model: str
    attack: Spec
    defence: Spec
    seed: int
    settings: Mapping[str, Any]

    def key(self) -> str:
        """A hash of all that decides the cell's rows, the version of the code included."""
        content = [self.model, self.attack, self.defence, self.seed, self.settings, _VERSION]
        return hashlib.sha256(canonical(content)).hexdigest()

    def name(self) -> str:
        """A folder name that people can read and no other cell has."""
        shown = (self.model, self.attack["name"], self.defence["name"], f"seed{self.seed}")
        return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", str(part)).strip("-") for part in shown) + f"_{self.key()[:12]}"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All cells, each once, and which of them every experiment looks at, by key and in the order of its axes."""

    cells: tuple[Cell, ...]
    experiments: Mapping[str, tuple[str, ...]]


def read_matrix(
    experiments: Mapping[str, Any], settings: Mapping[str, Any], scales: Mapping[str, Any], scale: str
) -> Matrix:
    """The cells of a matrix.

    `experiments`: name to axes (`model`, `attack`, `defence`, `seed`, a value or a list each) and `settings`, in which
    lists multiply too. `settings`: of all experiments. `scales`: name to a mapping with `settings` and `experiments`
    that replace single entries of those, and `seed`, of every experiment; `scale` names the one to use.
    Errors: ValueError that names the experiment and the entry.
    """
    if scale not in scales and scale != "default":
        raise ValueError(f"the matrix has no scale {scale!r}; it has: {', '.join(['default', *scales])}")
    changed = _mapping(scales.get(scale, {}), f"scales: {scale}")
    for key in changed:
        if key not in ("seed", "settings", "experiments"):
            raise ValueError(f"scales: {scale}: unknown entry {key!r}; known: seed, settings, experiments")
    over = _mapping(changed.get("experiments", {}), f"scales: {scale}: experiments")
    for name in over:
        if name not in experiments:
            raise ValueError(f"scales: {scale}: there is no experiment {name!r}")
    shared = {**settings, **_mapping(changed.get("settings", {}), f"scales: {scale}: settings")}
    found: dict[str, Cell] = {}
    looked_at: dict[str, tuple[str, ...]] = {}
    for name, content in experiments.items():
        own, more = _mapping(content, name), _mapping(over.get(name, {}), f"scales: {scale}: {name}")
        seeds = {"seed": changed["seed"]} if "seed" in changed else {}
        merged = {**own, **seeds, **more, "settings": {**shared, **_settings(own, name), **_settings(more, name)}}
        cells = {cell.key(): cell for cell in _cells(merged, name)}
        found |= cells
        looked_at[name] = tuple(cells)
    if not found:
        raise ValueError("the matrix has no experiments")
    return Matrix(cells=tuple(found.values()), experiments=looked_at)


def _cells(content: Mapping[str, Any], experiment: str) -> list[Cell]:
    for key in content:
        if key not in (*AXES, "settings"):
            raise ValueError(f"{experiment}: unknown entry {key!r}; known: {', '.join((*AXES, 'settings'))}")
    for axis in AXES:
        if axis not in content:
            raise ValueError(f"{experiment}: {axis} must be given")
    models, seeds = _listed(content["model"]), _listed(content["seed"])
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"{experiment}: seed must be a whole number, got {seed!r}")
    attacks = [_spec(value, f"{experiment}: attack") for value in _listed(content["attack"])]
    defences = [_spec(value, f"{experiment}: defence") for value in _listed(content["defence"])]
    names = list(content["settings"])
    varied = [dict(zip(names, values, strict=True)) for values in _product(content["settings"].values())]
    return [
        Cell(model=str(model), attack=attack, defence=defence, seed=seed, settings=chosen)
        for chosen, model, attack, defence, seed in itertools.product(varied, models, attacks, defences, seeds)
    ]


def _product(values: Any) -> Any:
    return itertools.product(*(_listed(value) for value in values))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _spec(value: Any, where: str) -> dict[str, Any]:
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ValueError(f"{where} must be a name or a mapping with one, got {value!r}")
    return spec


def _settings(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _mapping(content.get("settings", {}), f"{name}: settings")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return value


def spelt(spec: Mapping[str, Any]) -> str:
    """A name with its parameters: `mixed ratio=0.05`."""
    return " ".join([str(spec["name"]), *(f"{key}={value}" for key, value in spec.items() if key != "name")])
