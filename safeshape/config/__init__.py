"""Settings of every verb, one validated dataclass each, and the command-line parser made from it.

Nothing heavy is imported here: `--help` must answer at once.
"""

from safeshape.config.demo import DemoConfig
from safeshape.config.judge import JudgeConfig
from safeshape.config.judge_validate import JudgeValidateConfig
from safeshape.config.parser import first_problem, option, parse, parser_for, read_yaml, unknown_key, validated
from safeshape.config.probe_data import PromptSet
from safeshape.config.probe_eval import ProbeEvalConfig
from safeshape.config.probe_fit import ProbeFitConfig
from safeshape.config.probe_score import ProbeScoreConfig
from safeshape.config.score import ScoreConfig
from safeshape.config.score_calibrate import ScoreCalibrateConfig
from safeshape.config.score_export import ScoreExportConfig
from safeshape.config.score_view import ScoreViewConfig
from safeshape.config.train import TrainConfig
from safeshape.config.world import WorldConfig

__all__ = [
    "DemoConfig",
<<<<<<< HEAD
    "JudgeConfig",
    "JudgeValidateConfig",
=======
    "ProbeEvalConfig",
    "ProbeFitConfig",
    "ProbeScoreConfig",
    "PromptSet",
>>>>>>> probe
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
