"""Evaluations: tasks from public suites or your own, answers that outlive a killed run, scorers, rows of results."""

from safeshape.evals.records import Answered, Kind, Measured, Outcome, Task, Verdict, rate_row
from safeshape.evals.running import run_task

__all__ = ["Answered", "Kind", "Measured", "Outcome", "Task", "Verdict", "rate_row", "run_task"]
