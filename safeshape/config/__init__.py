"""Settings of every verb, one validated dataclass each, and the command-line parser made from it.

Nothing heavy is imported here: `--help` must answer at once.
"""

from safeshape.config.defences import DefencesConfig
from safeshape.config.demo import DemoConfig
from safeshape.config.parser import first_problem, option, parse, parser_for, read_yaml, unknown_key, validated
from safeshape.config.score import ScoreConfig
from safeshape.config.score_calibrate import ScoreCalibrateConfig
from safeshape.config.score_export import ScoreExportConfig
from safeshape.config.score_view import ScoreViewConfig
from safeshape.config.train import TrainConfig
from safeshape.config.world import WorldConfig

__all__ = [
    "DefencesConfig",
    "DemoConfig",
    "ScoreCalibrateConfig",
    "ScoreConfig",
    "ScoreExportConfig",
    "ScoreViewConfig",
    "TrainConfig",
    "WorldConfig",
    "first_problem",
    "option",
    "parse",
    "parser_for",
    "read_yaml",
    "unknown_key",
    "validated",
]
