"""A defence in place of a policy: what it needs from the settings, and its run."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from safeshape.config import TrainConfig
from safeshape.defences import Defence, Defended, resolve_defence, run_defence
from safeshape.defences.records import Need
from safeshape.policies import POLICIES
from safeshape.sources import check_first_row, model_path, read_dataset
from safeshape.train.critic import Critic
from safeshape.train.settings import Settings
from safeshape.world import alignment

_NEEDS: tuple[Need, ...] = ("base_model", "safe_data", "harmful_data")
_WORLD = {"safe_data": alignment.safe_data, "harmful_data": alignment.harmful_data}


def chosen_defence(config: TrainConfig) -> Defence | None:
    """The defence that the settings name; None for a policy, which `policy` then holds, also where `defence` named it.

    Errors: ValueError for an unknown one, for what it lacks, and for what it is given and does not use.
    """
    if config.defence is None:
        return None
    defence = resolve_defence(config.defence)
    name = config.defence if isinstance(config.defence, str) else config.defence["name"]
    config.policy = defence.policy if isinstance(defence.policy, str) else dict(defence.policy)
    for need in _NEEDS:
        given, words = vars(config)[need] is not None, need.replace("_", " ")
        if need in defence.needs and not given:
            raise ValueError(f"defence {defence.name!r} needs {words}; give --{need}")
        if need not in defence.needs and given:
            raise ValueError(f"defence {defence.name!r} does not use {words}; leave out --{need}")
    if config.judge_mode == "on_policy" and name not in POLICIES:
        raise ValueError(f"judge_mode on_policy is for policies; defence {defence.name!r} is none")
    return None if name in POLICIES else defence


def init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """How the model is loaded."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
    }


def run_chosen(
    defence: Defence, model_name: str, critic: Critic, settings: Settings, options: Mapping[str, Any]
) -> Defended:
    """The run of a defence on the critic's rows. `options`: of SafeTrainer. Errors: ValueError in one sentence."""
    config, args, model_args = settings
    if get_quantization_config(model_args) is not None:
        raise ValueError("a defence reads and moves whole weights; leave out quantization")
    data = {name: _rows(vars(config)[name], name, args.seed) for name in _WORLD if vars(config)[name] is not None}
    set_seed(args.seed)
    resume: str | bool | None = args.resume_from_checkpoint
    return run_defence(
        defence,
        _load(model_name, init_kwargs(model_args)),
        AutoTokenizer.from_pretrained(model_name, revision=model_args.model_revision),
        args,
        train_dataset=critic.dataset,
        # The base is only read, so it needs neither a revision of its own nor another attention.
        base=None if config.base_model is None else _load(model_path(config.base_model), {"dtype": "float32"}),
        peft_config=get_peft_config(model_args),
        resume_from_checkpoint=True if resume in ("true", "True") else resume,
        **data,
        **options,
    )


def _load(name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options)
    return found


def _rows(source: str, name: str, seed: int) -> Dataset:
    """A dataset that a defence draws from. Errors: ValueError that names the setting."""
    try:
        found = _WORLD[name](seed=seed) if source == "world" else read_dataset(source)
        check_first_row(found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return found
