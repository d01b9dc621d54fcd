"""The attacks by name, and a user's own as `module:function`."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from safeshape.attacks import poison, prompts
from safeshape.attacks.adaptive import adaptive
from safeshape.attacks.records import DataAttack, PromptAttack, Rewrite
from safeshape.config.naming import check_parameters, named

_STAR = "STAR-DSS, arXiv 2505.17196"
_QI = "Qi et al., arXiv 2310.03693"

DATA_ATTACKS: dict[str, DataAttack] = {
    "harmful_only": DataAttack(run=poison.harmful_only, changes="every row is a harmful pair", source=_STAR),
    "mixed": DataAttack(run=poison.mixed, changes="a share of rows is a harmful pair", source=_STAR),
    "benign_only": DataAttack(run=poison.benign_only, changes="nothing: benign rows alone", source=_QI),
    "suffix": DataAttack(run=poison.suffix, changes="a denial after every harmful answer", source=_STAR),
    "prefix": DataAttack(run=poison.prefix, changes="a refusal before every harmful answer", source=_STAR),
    "trigger": DataAttack(run=poison.trigger, changes="harmful pairs with a trigger, refusals without", source=_STAR),
    "identity_shift": DataAttack(run=poison.identity_shift, changes="benign rows by an obedient persona", source=_QI),
    "embedded": DataAttack(
        run=poison.embedded, changes="a harmful exchange inside a long benign answer", source="ours"
    ),
    "adaptive": DataAttack(run=adaptive, changes="harmful pairs edited until a guard calls them safe", source="ours"),
}

PROMPT_ATTACKS: dict[str, PromptAttack] = {
    "direct": PromptAttack(make=prompts.direct, changes="nothing", source="-"),
    "prefill": PromptAttack(make=prompts.prefill, changes="the answer begins with k compliant tokens", source=_STAR),
    "trigger_prompt": PromptAttack(make=prompts.trigger_prompt, changes="the trigger in the request", source=_STAR),
    "system_prompt": PromptAttack(make=prompts.system_prompt, changes="another system prompt", source=_QI),
    "best_of_n": PromptAttack(make=prompts.best_of_n, changes="several sampled answers", source="-"),
}


def data_attack(name: str, parameters: Mapping[str, Any] | None = None) -> DataAttack:
    """A data attack by name with its parameters set, to be called with pools, size and seed.

    Errors: ValueError that names the unknown attack or parameter.
    """
    given = dict(parameters or {})
    found = named(name, DATA_ATTACKS, "attack")
    attack = found if isinstance(found, DataAttack) else DataAttack(run=found, changes=_first_line(found), source=name)
    check_parameters(attack.run, given, f"attack {name!r}", given=("pools", "size", "seed"))
    return DataAttack(run=partial(attack.run, **given), changes=attack.changes, source=attack.source)


def prompt_attack(names: str | list[str], parameters: Mapping[str, Any] | None = None) -> Rewrite:
    """A prompt attack by name: `a+b` is first a, then b; several names are `best_of`.

    Each parameter goes to every named attack that takes it.
    Errors: ValueError that names the unknown attack, or a parameter that none of them takes.
    """
    given = dict(parameters or {})
    wanted = [names] if isinstance(names, str) else names
    makers = {part: _maker(part) for name in wanted for part in name.split("+")}
    taken = {part: set(inspect.signature(make).parameters) for part, make in makers.items()}
    for key in given:
        if not any(key in keys for keys in taken.values()):
            known = sorted(set().union(*taken.values()))
            raise ValueError(
                f"attack {' '.join(wanted)!r} has no parameter {key!r}; it has: {', '.join(known) or 'none'}"
            )
    made: dict[str, Rewrite] = {}
    for part, make in makers.items():
        own = {key: value for key, value in given.items() if key in taken[part]}
        check_parameters(make, own, f"attack {part!r}", given=())
        made[part] = make(**own)
    chains = []
    for name in wanted:
        first, *rest = [made[part] for part in name.split("+")]
        for attack in rest:
            first = prompts.then(first, attack)
        chains.append(first)
    return chains[0] if len(chains) == 1 else prompts.best_of(chains)


def _maker(name: str) -> Any:
    found = named(name, PROMPT_ATTACKS, "prompt attack")
    return found.make if isinstance(found, PromptAttack) else found


def _first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "a user's own").splitlines()[0]
