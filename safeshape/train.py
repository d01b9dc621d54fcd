"""The `train` verb: a recipe or flags in, a trained model with its record out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from pydantic import ValidationError
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from safeshape import world
from safeshape.config import TrainConfig, first_problem, read_yaml, unknown_key
from safeshape.models import load
from safeshape.policies import resolve_policy
from safeshape.refusals import refuse_unsupported
from safeshape.signals.column import score_dataset
from safeshape.signals.ensembles import load_scorer
from safeshape.signals.probes import Probe
from safeshape.sources import check_first_row, model_path, read_dataset, refuse_used
from safeshape.trainer import SafeTrainer

Settings = tuple[TrainConfig, SFTConfig, ModelConfig]


class _Parser(TrlParser):  # type: ignore[misc]
    """TrlParser that raises instead of printing several hundred lines of usage."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parser() -> TrlParser:
    """The parser of every TrainConfig, SFTConfig and ModelConfig flag."""
    found = _Parser([TrainConfig, SFTConfig, ModelConfig], prog="safeshape train", allow_abbrev=False)
    # TRL's own default is bf16 everywhere; without a GPU that is slower and blurs small divergences.
    gpu = torch.cuda.is_available()
    found.set_defaults(bf16=gpu, dataloader_pin_memory=gpu, output_dir="")
    return found


def parse_settings(argv: Sequence[str]) -> Settings:
    """Read `--config` and flags; flags win.

    YAML scalars go through the flags' own types, so that `learning_rate: fast` is refused by name like a bad flag.
    Errors: ValueError that names the setting.
    """
    argv, found = list(argv), parser()
    if "--config" in argv:
        place = argv.index("--config")
        if place + 1 == len(argv):
            raise ValueError("--config needs a file")
        path = argv[place + 1]
        del argv[place : place + 2]
        known = {action.dest: action for action in found._actions}
        given = read_yaml(path)
        for key, value in given.items():
            if key not in known:
                raise unknown_key(str(key), list(known), path)
            if isinstance(value, list) and known[key].nargs not in ("+", "*"):
                raise ValueError(f"{path}: {key} takes one value, got a list")
        scalars = {k: str(v) if isinstance(v, int | float) else v for k, v in given.items()}
        found.set_defaults_with_config(**scalars)
    try:
        config, args, model_args = found.parse_args_into_dataclasses(args=argv)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    except ValueError as error:
        raise ValueError(_plain(str(error), found)) from error
    return config, args, model_args


def _plain(message: str, found: TrlParser) -> str:
    """Turn the parser's complaint about unused arguments into one sentence."""
    if "not used by the HfArgumentParser" not in message:
        return message
    first = message.split("[", 1)[1].split(",")[0].strip(" '\"]")
    return str(unknown_key(first, [flag for action in found._actions for flag in action.option_strings], "flags"))


def scored(dataset: Dataset, settings: Settings, model_name: str, progress: Any) -> Dataset:
    """The dataset with the `safety` column that the settings ask for; the scorer is on the training device.

    A probe beside a policy with a reference scores later, off the reference's own pass.
    """
    config, args, model_args = settings
    if config.guard:
        source = world.path("guard") if config.guard == "world" else None
        guard = load_scorer(config.guard, model=config.guard_model or source, device=str(args.device))
        return score_dataset(dataset, lambda rows: guard.score_many(rows, chunk=config.chunk), progress=progress)
    if config.probe and not resolve_policy(config.policy or "").needs_reference:
        dtype, revision = model_args.dtype or "float32", model_args.model_revision
        model, tokenizer = load(model_name, revision=revision, dtype=dtype)
        probe = Probe.from_pretrained(config.probe, model=model.to(args.device), tokenizer=tokenizer)
        return score_dataset(dataset, probe.score_many, progress=progress)
    return dataset


def make_trainer(model_name: str, dataset: Dataset, settings: Settings) -> SafeTrainer:
    """The trainer that the settings describe."""
    config, args, model_args = settings
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
    }
    peft_config: PeftConfig | None = get_peft_config(model_args)
    online = config.probe is not None and resolve_policy(config.policy or "").needs_reference
    return SafeTrainer(
        model_name,
        args,
        train_dataset=dataset,
        policy=config.policy or "",
        reference=config.reference,
        probe=Probe.from_pretrained(config.probe, weights_only=True) if online and config.probe else None,
        gradient_floor=config.gradient_floor,
        overlong=config.overlong,
        loss_head=config.loss_head,
        cache_dir=config.cache_dir,
        cache_dtype=config.cache_dtype,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )


def train(argv: Sequence[str], progress: Any) -> str:
    """Run the verb and return the folder of the result.

    Everything that can be refused is refused before anything is written. Errors: ValueError in one sentence.
    """
    config, args, model_args = parse_settings(argv)
    if not args.resume_from_checkpoint:
        refuse_used(args.output_dir)
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path must be given")
    refuse_unsupported(args)
    resolved = resolve_policy(config.policy or "")
    name = model_path(model_args.model_name_or_path)
    dataset = read_dataset(config.dataset_name, config.dataset_split)
    check_first_row(dataset)
    if resolved.needs_signal and not (config.guard or config.probe) and "safety" not in dataset.column_names:
        raise ValueError(
            f"policy {resolved.name!r} needs scores, and {config.dataset_name} has no `safety` column; "
            "give --guard or --probe, or run `safeshape score` first"
        )
    dataset = scored(dataset, (config, args, model_args), name, progress)
    trainer = make_trainer(name, dataset, (config, args, model_args))
    resume: str | bool | None = args.resume_from_checkpoint
    outcome = trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model(args.output_dir)
    if config.cache_dir is None:
        trainer.remove_stored_states()
    if trainer.accelerator.is_main_process:
        numbers = {"metrics": outcome.metrics, "log": trainer.state.log_history}
        (Path(args.output_dir) / "train_results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return str(args.output_dir)
