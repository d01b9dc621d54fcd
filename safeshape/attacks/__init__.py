"""Attacks: ways to poison fine-tuning data or prompts. Each is a value with one function; none knows a judge."""

from safeshape.attacks.prompts import best_of, run_prompts, then
from safeshape.attacks.records import Attacked, DataAttack, Poisoned, Pools, PromptAttack, Rewrite
from safeshape.attacks.tables import DATA_ATTACKS, PROMPT_ATTACKS, data_attack, prompt_attack

__all__ = [
    "DATA_ATTACKS",
    "PROMPT_ATTACKS",
    "Attacked",
    "DataAttack",
    "Poisoned",
    "Pools",
    "PromptAttack",
    "Rewrite",
    "best_of",
    "data_attack",
    "prompt_attack",
    "run_prompts",
    "then",
]
