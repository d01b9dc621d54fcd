"""The command-line parser made from a verb's settings, and the validation of what it reads."""

import argparse
import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, ValidationError

STRICT = ConfigDict(extra="forbid")
C = TypeVar("C")


def option(default: Any = MISSING, *, help: str, **bounds: Any) -> Any:
    """A field with its help text; without a default it is required."""
    metadata = {"help": help, **bounds}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError in one sentence instead of printing its usage."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parser_for(config: type[Any], verb: str) -> Parser:
    """A parser with one flag per field; mappings have none, they stand in the file.

    Errors while parsing are ValueErrors that name the flag.
    """
    parser = Parser(prog=f"safeshape {verb}", description=config.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with any of these settings; flags win")
    for item in fields(config):
        if get_origin(item.type) is dict:
            continue
        kind, many, choices = _flag_type(item.type)
        required = item.default is MISSING and item.default_factory is MISSING
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        shown = " (required)" if required else "" if default in (None, []) else f" (default: {default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, **({"nargs": "+", "action": "extend"} if many else {})}
        # A positional `action` reads better than a flag: `safeshape world build`.
        name = item.name if item.name == "action" else f"--{item.name}"
        if item.name == "action":
            options |= {"nargs": "?", "default": None}  # argparse would check a suppressed default against the choices
        else:
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        if kind is bool:  # argparse would take any text for true; pydantic reads it. The bare flag is true.
            kind, options = str, options | {"nargs": "?", "const": "true"}
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


def underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with `--some-flag` as `--some_flag`; what follows an equals sign stays as it is."""
    found = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        found.append(
            (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
        )
    return found


def parse(config: type[C], verb: str, argv: Sequence[str]) -> C:
    """Read a verb's settings from `--config` and flags; flags win. Errors: ValueError that names the field."""
    given = vars(parser_for(config, verb).parse_args(underscored(argv)))
    flags = {k: v for k, v in given.items() if v is not None}
    path = flags.pop("config", None)
    values = {} if path is None else read_yaml(path)
    known = [item.name for item in fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_key(str(key), known, path or verb)
    return validated(config, {**values, **flags})
