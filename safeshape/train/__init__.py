"""The `train` verb: a recipe or flags in, a trained model with its record out."""

from safeshape.train.run import train
from safeshape.train.settings import parse_settings, parser

__all__ = ["parse_settings", "parser", "train"]
