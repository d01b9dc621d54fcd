"""Defences: values that say what happens to data, gradients and weights so that a fine-tuned model stays safe."""

from safeshape.defences.data import with_system_prompt
from safeshape.defences.records import Context, Defence, NothingToTrain
from safeshape.defences.run import Defended, check_defence, run_defence, save_defended
from safeshape.defences.stepping import Loop, Stepper
from safeshape.defences.table import DEFENCES, resolve_defence
from safeshape.defences.trainer import DefendedTrainer

__all__ = [
    "DEFENCES",
    "Context",
    "Defence",
    "Defended",
    "DefendedTrainer",
    "Loop",
    "NothingToTrain",
    "Stepper",
    "check_defence",
    "resolve_defence",
    "run_defence",
    "save_defended",
    "with_system_prompt",
]
