"""Settings of every verb, one validated dataclass each, and the command-line parser made from it.

Nothing heavy is imported here: `--help` must answer at once.
"""

import argparse
import difflib
import json
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
C = TypeVar("C")


def option(default: Any = MISSING, *, help: str, **bounds: Any) -> Any:
    """A field with its help text; without a default it is required."""
    metadata = {"help": help, **bounds}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(config=STRICT, kw_only=True)
class TrainConfig:
    """Fine-tune a model with a safety policy."""

    dataset_name: str = option(help="a JSONL, JSON, CSV or Parquet file, a saved dataset folder, or a Hub id")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    policy: dict[str, Any] | str | None = option(
        "star", help='a policy name, a JSON object such as \'{"name": "star", "kl": 0.5}\', or your own module:function'
    )
    reference: Literal["auto", "adapter_off", "copy"] = option("auto", help="the frozen model the KL holds to")
    gradient_floor: float = option(1e-6, help="updates with a smaller gradient norm are skipped and counted")
    overlong: Literal["refuse", "truncate"] = option("refuse", help="what happens to rows longer than max_length")
    guard: str | None = option(None, help="score rows first with this guard (world, llama-guard-3), one score a chunk")
    guard_model: str | None = option(None, help="folder or Hub id of the guard's weights, where not the row's own")
    chunk: int = option(5, help="words per chunk of the guard's score")
    probe: str | None = option(None, help="score rows first with the activation probe saved in this folder")

    def __post_init__(self) -> None:
        if isinstance(self.policy, str) and self.policy.startswith("{"):
            try:
                self.policy = json.loads(self.policy)
            except json.JSONDecodeError as error:
                raise ValueError(f"policy is not valid JSON: {error}") from error
        if self.policy is None:
            raise ValueError("policy must be given")
        if self.gradient_floor < 0:
            raise ValueError(f"gradient_floor must be at least 0, got {self.gradient_floor}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.guard and self.probe:
            raise ValueError("give a guard or a probe, not both")


@dataclass(config=STRICT, kw_only=True)
class ScoreConfig:
    """Score every partial answer of a dataset with a guard (STAR) and write it with a `safety` column."""

    dataset_name: str = option(help="a JSONL, JSON, CSV or Parquet file, a saved dataset folder, or a Hub id")
    output: str = option(help="where to write: a .jsonl or .parquet file, or a folder for a saved dataset")
    dataset_split: str = option("train", help="split to use of a Hub dataset or dataset dict")
    guard: str = option("world", help="row of the guard table: world, llama-guard-3")
    guard_model: str | None = option(None, help="folder or Hub id of the guard's weights, where not the row's own")
    chunk: int = option(5, help="units per chunk")
    unit: Literal["words", "tokens"] = option("words", help="what a chunk counts")
    batch_size: int = option(64, help="prefixes per forward")
    device: str = option("cpu", help="torch device of the guard")

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.batch_size < 1:
            raise ValueError("chunk and batch_size must be at least 1")


@dataclass(config=STRICT, kw_only=True)
class DemoConfig:
    """Show an aligned model losing its safety under plain fine-tuning and keeping it under Safeshape."""

    output_dir: str = option("demo-output", help="folder for report.html and results.json")
    family: Literal["llama", "qwen3", "phi3"] = option("llama", help="which model of the embedded world")
    seed: int = option(0, help="seed of data, training and evaluation")
    size: int = option(400, help="rows of user data")
    harmful_share: float = option(0.2, help="share of them that is harmful")
    prompts: int = option(150, help="held-out prompts per evaluation")
    epochs: int = option(6, help="epochs of fine-tuning; qwen3 and phi3 need more to learn the task")

    def __post_init__(self) -> None:
        if not 20 <= self.size <= 500:
            raise ValueError(f"size must be 20 to 500 (the world has no more different notes), got {self.size}")
        if not 0 < self.harmful_share < 1:
            raise ValueError(f"harmful_share must lie between 0 and 1, got {self.harmful_share}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not 10 <= self.prompts <= 170:
            raise ValueError(f"prompts must be 10 to 170, got {self.prompts}")


@dataclass(config=STRICT, kw_only=True)
class WorldConfig:
    """Build the embedded world's models from a seed, or say where the shipped ones are."""

    action: Literal["build", "show"] = option("show", help="build: train them anew; show: list the shipped ones")
    output_dir: str | None = option(None, help="build: a new or empty folder for the models")
    seed: int = option(0, help="build: seed; the shipped models are from seed 0")
    only: list[str] = field(
        default_factory=lambda: ["llama", "qwen3", "phi3", "guard"], metadata={"help": "build: which models"}
    )

    def __post_init__(self) -> None:
        if self.action == "build" and self.output_dir is None:
            raise ValueError("output_dir must be given to build")


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError in one sentence instead of printing its usage."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parser_for(config: type[Any], verb: str) -> Parser:
    """A parser with one flag per field. Errors while parsing are ValueErrors that name the flag."""
    parser = Parser(prog=f"safeshape {verb}", description=config.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with any of these settings; flags win")
    for item in fields(config):
        kind, many, choices = _flag_type(item.type)
        required = item.default is MISSING and item.default_factory is MISSING
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        shown = " (required)" if required else f" (default: {default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, **({"nargs": "+"} if many else {})}
        # A positional `action` reads better than a flag: `safeshape world build`.
        name = item.name if item.name == "action" else f"--{item.name}"
        if item.name == "action":
            options |= {"nargs": "?", "default": None}  # argparse would check a suppressed default against the choices
        else:
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        parser.add_argument(
            name,
            type=kind,
            choices=choices or None,
            help=(item.metadata["help"] + shown).replace("%", "%%"),
            **options,
        )
    return parser


def _flag_type(annotation: Any) -> tuple[type, bool, tuple[str, ...]]:
    """The type of one flag value, whether there are many, and the allowed values."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        annotation = str if str in members else members[0]
    if get_origin(annotation) is Literal:
        return str, False, get_args(annotation)
    if get_origin(annotation) is list:
        return get_args(annotation)[0], True, ()
    return annotation, False, ()


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping. Errors: ValueError that names the file."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings to values")
    return content


def unknown_key(key: str, known: Sequence[str], where: str) -> ValueError:
    """The error for a setting nobody has, with the nearest one that exists."""
    near = difflib.get_close_matches(key, known, n=1)
    return ValueError(f"{where}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def first_problem(error: ValidationError) -> str:
    """One sentence for the first field that pydantic refused."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{name} must be given"
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, got {first['input']!r}" if name else message


def validated(config: type[C], values: dict[str, Any]) -> C:
    """An instance of a config. Errors: ValueError that names the field."""
    try:
        return config(**values)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


def parse(config: type[C], verb: str, argv: Sequence[str]) -> C:
    """Read a verb's settings from `--config` and flags; flags win. Errors: ValueError that names the field."""
    flags = {k: v for k, v in vars(parser_for(config, verb).parse_args(list(argv))).items() if v is not None}
    path = flags.pop("config", None)
    values = {} if path is None else read_yaml(path)
    known = [item.name for item in fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_key(str(key), known, path or verb)
    return validated(config, {**values, **flags})
