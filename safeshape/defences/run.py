"""One run of a defence: from an aligned model and a user's rows to a fine-tuned model that is ready to be served."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig

from safeshape.defences.nested import merged, nested_settings, own_copy, text_only
from safeshape.defences.records import Context, Defence, Model, required
from safeshape.defences.stepping import Stepper
from safeshape.defences.table import resolve_defence
from safeshape.defences.trainer import DefendedTrainer, refuse_stepping
from safeshape.provenance import RECORD
from safeshape.refusals import refuse_unsupported

HARDENED = "hardened"


@dataclass(frozen=True, kw_only=True)
class Defended:
    """What comes out. `system_prompt`: what must stand before each request; None for nothing.

    `trainer`: of the fine-tuning run, with its logs. `metrics`: what its training returned.
    """

    model: Model
    system_prompt: str | None
    trainer: DefendedTrainer
    metrics: Mapping[str, float]


def check_defence(defence: Defence, context: Context, dataset: Dataset) -> None:
    """Errors: ValueError, before anything is computed, for what the defence lacks or cannot work with."""
    if not isinstance(dataset, Dataset):
        raise ValueError("a defence needs a dataset with a length, not a stream")
    for need, value in (
        ("base_model", context.base),
        ("safe_data", context.safe_data),
        ("harmful_data", context.harmful_data),
    ):
        if need in defence.needs:
            required(value, need, defence.name)
    if "scores" in defence.needs and "safety" not in dataset.column_names:
        raise ValueError(
            f"defence {defence.name!r} needs scores by a {' or '.join(defence.scores_by)}, and the data have no "
            "`safety` column; score them first"
        )
    adapter = context.peft_config is not None
    if defence.trained != "any" and adapter != (defence.trained == "lora"):
        kind = "a LoRA adapter" if defence.trained == "lora" else "full fine-tuning"
        raise ValueError(f"defence {defence.name!r} works with {kind} only")
    if context.args.world_size > 1:
        raise ValueError("a defence runs in one process")
    refuse_unsupported(context.args)
    if defence.stepper is not None:
        refuse_stepping(context.args)


def run_defence(
    spec: str | Mapping[str, Any] | Defence,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    *,
    train_dataset: Dataset,
    base: PreTrainedModel | None = None,
    safe_data: Dataset | None = None,
    harmful_data: Dataset | None = None,
    peft_config: PeftConfig | None = None,
    resume_from_checkpoint: str | bool | None = None,
    quiet: bool = False,
    **options: Any,
) -> Defended:
    """Fine-tune `model`, which is moved, on the user's rows under a defence.

    `options`: further settings of SafeTrainer. `quiet`: nothing is printed where progress bars are off.
    `resume_from_checkpoint`: as there; what came before fine-tuning is done again, except that a model hardened in an
    alignment stage is read back from `hardened` in the output folder.
    Errors: ValueError in one sentence.
    """
    defence = resolve_defence(spec)
    context = Context(
        tokenizer=tokenizer,
        args=args,
        peft_config=peft_config,
        base=base,
        safe_data=safe_data,
        harmful_data=harmful_data,
        resume=bool(resume_from_checkpoint),
    )
    check_defence(defence, context, train_dataset)
    if defence.before is not None:
        model = defence.before(model, context)
    if defence.stage == "alignment":
        model = _hardened(defence, model, context)
    if defence.keeps_start == "always" or (defence.keeps_start == "full" and peft_config is None):
        context = replace(context, start=own_copy(model).requires_grad_(False))
    rows = train_dataset if defence.prepare is None else defence.prepare(train_dataset, context)
    context = replace(context, user_data=rows)
    trainer = _trainer(defence, model, context, options)
    if quiet:
        trainer.remove_callback(PrinterCallback)
    outcome = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    if trainer.stepper is not None:
        trainer.stepper.finish(trainer.model)
    found: Model = trainer.model
    if defence.finish is not None:
        found = defence.finish(found, context)
    if defence.before is not None or defence.stage == "alignment":
        found = merged(found)  # an adapter alone would be put on the model that the caller named, which is another one
    return Defended(model=found, system_prompt=defence.system_prompt, trainer=trainer, metrics=dict(outcome.metrics))


def save_defended(defended: Defended, folder: str | Path) -> None:
    """Write what comes out as `SafeTrainer.save_model` does, with its system prompt in `safeshape.json`."""
    trainer, path = defended.trainer, Path(folder)
    trainer.save_model(str(path))
    if defended.model is not trainer.model:
        for stale in (*path.glob("adapter_*"), *path.glob("model*.safetensors*")):
            stale.unlink()
        defended.model.save_pretrained(path)
    record = {**trainer.record(), "system_prompt": defended.system_prompt}
    (path / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _stepper(defence: Defence, context: Context, *, alignment: bool) -> Stepper | None:
    if defence.stepper is None or (defence.stage == "alignment") != alignment:
        return None
    return defence.stepper(context)


def _trainer(defence: Defence, model: PreTrainedModel, context: Context, options: Mapping[str, Any]) -> DefendedTrainer:
    freeze, own = defence.freeze, [] if defence.callbacks is None else defence.callbacks(context)
    return DefendedTrainer(
        model,
        context.args,
        train_dataset=context.user_data,
        processing_class=context.tokenizer,
        peft_config=context.peft_config,
        policy=defence.policy,
        callbacks=[*own, *options.get("callbacks", ())],
        stepper=_stepper(defence, context, alignment=False),
        safe_data=context.safe_data if "safe_data" in defence.needs else None,
        harmful_data=context.harmful_data if "harmful_data" in defence.needs else None,
        freeze=None if freeze is None else lambda trained: freeze(trained, context),
        defence={"name": defence.name, **defence.parameters},
        **{name: value for name, value in options.items() if name != "callbacks"},
    )


def _hardened(defence: Defence, model: PreTrainedModel, context: Context) -> PreTrainedModel:
    """The model after its alignment stage, an adapter of that stage merged; kept on disk for a resumed run."""
    folder = Path(context.output_dir) / HARDENED
    if context.resume and (folder / "config.json").is_file():
        kept: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        return kept
    safe = required(context.safe_data, "safe_data", defence.name)
    trainer = DefendedTrainer(
        model,
        nested_settings(context.args, "alignment", max_steps=-1, **defence.alignment),
        train_dataset=text_only(safe),
        processing_class=context.tokenizer,
        peft_config=copy.deepcopy(context.peft_config),
        policy="sft",
        stepper=_stepper(defence, context, alignment=True),
        harmful_data=context.harmful_data if "harmful_data" in defence.needs else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    whole = own_copy(merged(trainer.model))
    unfinished = folder.with_name(f"{HARDENED}.unfinished")
    whole.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)  # at once: a run that was killed while it wrote is hardened anew
    return whole
