"""A run: settings to a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from trl import get_peft_config, get_quantization_config

from safeshape.config import TrainConfig
from safeshape.defences import Defence, save_defended
from safeshape.policies import resolve_policy
from safeshape.refusals import refuse_unsupported
from safeshape.sources import check_first_row, model_path, read_dataset, refuse_used
from safeshape.train.critic import Critic, open_critic, results, write_probe
from safeshape.train.defended import chosen_defence, init_kwargs, run_chosen
from safeshape.train.settings import Settings, parse_settings
from safeshape.train.watching import Attach, open_watch
from safeshape.trainer import SafeTrainer


def trainer_options(critic: Critic, config: TrainConfig, watch: Sequence[Attach]) -> dict[str, Any]:
    """What SafeTrainer is given beside model, data and policy. `watch`: what looks on."""
    return {
        "reference": config.reference,
        "probe": critic.probe,
        "on_policy": critic.on_policy,
        "gradient_floor": config.gradient_floor,
        "overlong": config.overlong,
        "loss_head": config.loss_head,
        "cache_dir": config.cache_dir,
        "cache_dtype": config.cache_dtype,
        "watch": watch,
    }


def make_trainer(model_name: str, critic: Critic, settings: Settings, watch: Sequence[Attach] = ()) -> SafeTrainer:
    """The trainer that the settings describe. `watch`: what looks on."""
    config, args, model_args = settings
    args.model_init_kwargs = init_kwargs(model_args)
    peft_config: PeftConfig | None = get_peft_config(model_args)
    trainer = SafeTrainer(
        model_name,
        args,
        train_dataset=critic.dataset,
        policy=config.policy or "",
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
        **trainer_options(critic, config, watch),
    )
    trainer.notes = critic.counted
    return trainer


def trained(
    defence: Defence | None, model_name: str, critic: Critic, settings: Settings, watch: Sequence[Attach]
) -> tuple[SafeTrainer, Any]:
    """Train, write the model to the output folder, and return the trainer with the metrics of its training."""
    config, args, _ = settings
    if defence is not None:
        out = run_chosen(defence, model_name, critic, settings, trainer_options(critic, config, watch))
        out.trainer.notes = critic.counted
        save_defended(out, str(args.output_dir))
        write_probe(critic, args.output_dir)
        return out.trainer, out.metrics
    trainer = make_trainer(model_name, critic, settings, watch)
    write_probe(critic, args.output_dir)
    resume: str | bool | None = args.resume_from_checkpoint
    outcome = trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model(args.output_dir)
    return trainer, outcome.metrics


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
    defence = chosen_defence(config)
    resolved = resolve_policy(config.policy or "")
    needs_scores = resolved.needs_signal or (defence is not None and "scores" in defence.needs)
    named = f"policy {resolved.name!r}" if defence is None else f"defence {defence.name!r}"
    name = model_path(model_args.model_name_or_path)
    dataset = read_dataset(config.dataset_name, config.dataset_split)
    check_first_row(dataset)
    if needs_scores and not config.critic and "safety" not in dataset.column_names:
        raise ValueError(
            f"{named} needs scores, and {config.dataset_name} has no `safety` column; "
            "give --guard, --probe or --judge, or run `safeshape score` first"
        )
    if config.judge and not needs_scores:
        raise ValueError(f"{named} does not use a risk; leave out --judge")
    settings = (config, args, model_args)
    with open_watch(config, args.seed) as watch, open_critic(dataset, settings, name, progress) as critic:
        trainer, metrics = trained(defence, name, critic, settings, watch)
        if config.cache_dir is None:
            trainer.remove_stored_states()
        if trainer.accelerator.is_main_process:
            numbers = results(metrics, trainer.state.log_history, critic)
            (Path(args.output_dir) / "train_results.json").write_text(numbers)
    return str(args.output_dir)
