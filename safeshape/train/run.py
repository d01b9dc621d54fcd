"""A run: settings to a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from trl import get_peft_config, get_quantization_config

from safeshape.policies import resolve_policy
from safeshape.refusals import refuse_unsupported
from safeshape.sources import check_first_row, model_path, read_dataset, refuse_used
from safeshape.train.critic import Critic, open_critic, results, write_probe
from safeshape.train.settings import Settings, parse_settings
from safeshape.train.watching import Attach, open_watch
from safeshape.trainer import SafeTrainer


def make_trainer(model_name: str, critic: Critic, settings: Settings, watch: Sequence[Attach] = ()) -> SafeTrainer:
    """The trainer that the settings describe. `watch`: what looks on."""
    config, args, model_args = settings
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
    }
    peft_config: PeftConfig | None = get_peft_config(model_args)
    trainer = SafeTrainer(
        model_name,
        args,
        train_dataset=critic.dataset,
        policy=config.policy or "",
        reference=config.reference,
        probe=critic.probe,
        on_policy=critic.on_policy,
        gradient_floor=config.gradient_floor,
        overlong=config.overlong,
        loss_head=config.loss_head,
        cache_dir=config.cache_dir,
        cache_dtype=config.cache_dtype,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
        watch=watch,
    )
    trainer.notes = critic.counted
    return trainer


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
    if resolved.needs_signal and not config.critic and "safety" not in dataset.column_names:
        raise ValueError(
            f"policy {resolved.name!r} needs scores, and {config.dataset_name} has no `safety` column; "
            "give --guard, --probe or --judge, or run `safeshape score` first"
        )
    if config.judge and not resolved.needs_signal:
        raise ValueError(f"policy {resolved.name!r} does not use a risk; leave out --judge")
    settings = (config, args, model_args)
    with open_watch(config, args.seed) as watch, open_critic(dataset, settings, name, progress) as critic:
        trainer = make_trainer(name, critic, settings, watch)
        write_probe(critic, args.output_dir)
        resume: str | bool | None = args.resume_from_checkpoint
        outcome = trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
        trainer.save_model(args.output_dir)
        if config.cache_dir is None:
            trainer.remove_stored_states()
        if trainer.accelerator.is_main_process:
            numbers = results(outcome.metrics, trainer.state.log_history, critic)
            (Path(args.output_dir) / "train_results.json").write_text(numbers)
    return str(args.output_dir)
