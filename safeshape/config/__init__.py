"""Settings of every verb, one validated dataclass each, and the command-line parser made from it.

Nothing heavy is imported here: `--help` must answer at once.
"""

from safeshape.config.attack import AttackConfig
from safeshape.config.defences import DefencesConfig
from safeshape.config.demo import DemoConfig
from safeshape.config.eval import EvalConfig
from safeshape.config.eval_theorem import EvalTheoremConfig
from safeshape.config.judge import JudgeConfig
from safeshape.config.judge_validate import JudgeValidateConfig
from safeshape.config.parser import first_problem, option, parse, parser_for, read_yaml, unknown_key, validated
from safeshape.config.probe_data import PromptSet
from safeshape.config.probe_eval import ProbeEvalConfig
from safeshape.config.probe_fit import ProbeFitConfig
from safeshape.config.probe_score import ProbeScoreConfig
from safeshape.config.report import ReportConfig
from safeshape.config.score import ScoreConfig
from safeshape.config.score_calibrate import ScoreCalibrateConfig
from safeshape.config.score_export import ScoreExportConfig
from safeshape.config.score_view import ScoreViewConfig
from safeshape.config.train import TrainConfig
from safeshape.config.world import WorldConfig

__all__ = [
    "AttackConfig",
    "DefencesConfig",
    "DemoConfig",
    "EvalConfig",
    "EvalTheoremConfig",
    "JudgeConfig",
    "JudgeValidateConfig",
    "ProbeEvalConfig",
    "ProbeFitConfig",
    "ProbeScoreConfig",
    "PromptSet",
    "ReportConfig",
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
