"""What happens between the trainer's steps."""

from safeshape.callbacks.inert import InertAlarm
from safeshape.callbacks.safety import SafetyCheck, Watch
from safeshape.callbacks.steps import GradientFloor, StartAfterSharding

__all__ = ["GradientFloor", "InertAlarm", "SafetyCheck", "StartAfterSharding", "Watch"]
