"""Rows and scored answers to tables, figures and self-contained HTML pages."""

from safeshape.report.demo_page import color, colored_answer, write_report
from safeshape.report.figures import Trajectory, bar_figure, reliability_figure, trajectory_figure
from safeshape.report.tables import METRIC_NOTE, WORLD_NOTE, cell, markdown_table, table, text_table, write_results

__all__ = [
    "METRIC_NOTE",
    "WORLD_NOTE",
    "Trajectory",
    "bar_figure",
    "cell",
    "color",
    "colored_answer",
    "markdown_table",
    "reliability_figure",
    "table",
    "text_table",
    "trajectory_figure",
    "write_report",
    "write_results",
]
