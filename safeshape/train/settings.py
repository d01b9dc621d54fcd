"""Reading the settings of `safeshape train`: a recipe, flags, and TRL's own."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from trl import ModelConfig, SFTConfig, TrlParser

from safeshape.config import TrainConfig, first_problem, read_yaml, unknown_key

Settings = tuple[TrainConfig, SFTConfig, ModelConfig]


class _Parser(TrlParser):  # type: ignore[misc]
    """TrlParser that raises instead of printing several hundred lines of usage."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parser() -> TrlParser:
    """The parser of every TrainConfig, SFTConfig and ModelConfig flag."""
    found = _Parser([TrainConfig, SFTConfig, ModelConfig], prog="safeshape train", allow_abbrev=False)
    # TRL's own default is bf16 everywhere; without a GPU that is slower and blurs small divergences.
    gpu = torch.cuda.is_available()
    found.set_defaults(bf16=gpu, dataloader_pin_memory=gpu, output_dir="")
    return found


def parse_settings(argv: Sequence[str]) -> Settings:
    """Read `--config` and flags; flags win.

    YAML scalars go through the flags' own types, so that `learning_rate: fast` is refused by name like a bad flag.
    Errors: ValueError that names the setting.
    """
    argv, found = list(argv), parser()
    if "--config" in argv:
        place = argv.index("--config")
        if place + 1 == len(argv):
            raise ValueError("--config needs a file")
        path = argv[place + 1]
        del argv[place : place + 2]
        known = {action.dest: action for action in found._actions}
        given = read_yaml(path)
        for key, value in given.items():
            if key not in known:
                raise unknown_key(str(key), list(known), path)
            if isinstance(value, list) and known[key].nargs not in ("+", "*"):
                raise ValueError(f"{path}: {key} takes one value, got a list")
        scalars = {k: str(v) if isinstance(v, int | float) else v for k, v in given.items()}
        found.set_defaults_with_config(**scalars)
    try:
        config, args, model_args = found.parse_args_into_dataclasses(args=argv)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    except ValueError as error:
        raise ValueError(_plain(str(error), found)) from error
    return config, args, model_args


def _plain(message: str, found: TrlParser) -> str:
    """Turn the parser's complaint about unused arguments into one sentence."""
    if "not used by the HfArgumentParser" not in message:
        return message
    first = message.split("[", 1)[1].split(",")[0].strip(" '\"]")
    return str(unknown_key(first, [flag for action in found._actions for flag in action.option_strings], "flags"))
