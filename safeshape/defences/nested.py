"""Training runs inside a defence: on other data, from the same start, under the same settings."""

import copy
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig

from safeshape.data import conversation
from safeshape.defences.records import Context, Model
from safeshape.defences.stepping import Stepper
from safeshape.defences.trainer import DefendedTrainer
from safeshape.models.reference import frozen_copy


def text_only(*datasets: Dataset) -> Dataset:
    """The rows of these datasets, one after the other, in the form in which they are learned and without scores.

    Conversations stay conversations, with what their messages carry; two plain strings stay two plain strings.
    Errors: ValueError that names the row.
    """
    rows: list[dict[str, Any]] = []
    for dataset in datasets:
        for index, row in enumerate(dataset):
            try:
                messages = conversation(row)
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from error
            strings = {"prompt": row["prompt"], "completion": row["completion"]} if messages is None else {}
            rows.append({"messages": messages, **strings})
    names = [name for name in ("messages", "prompt", "completion") if any(row.get(name) is not None for row in rows)]
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def nested_settings(args: SFTConfig, folder: str, **changed: Any) -> SFTConfig:
    """The run's settings for a run inside it, which writes nothing but its own folder and never saves."""
    settings = copy.deepcopy(args)
    settings.output_dir = str(args.output_dir) + "/" + folder
    settings.save_strategy = "no"
    settings.eval_strategy = "no"
    settings.report_to = []
    settings.eval_on_start = False
    settings.push_to_hub = False
    settings.load_best_model_at_end = False
    settings.resume_from_checkpoint = None
    for name, value in changed.items():
        setattr(settings, name, value)
    return settings


def own_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that can be trained and shares nothing with the original."""
    twin = frozen_copy(model).requires_grad_(True)
    if not isinstance(twin, PreTrainedModel):
        raise ValueError("the model to be copied is not a language model")
    return twin


def trained_on(
    start: PreTrainedModel,
    dataset: Dataset,
    context: Context,
    folder: str,
    *,
    stepper: Stepper | None = None,
    **changed: Any,
) -> Model:
    """A copy of the start, fine-tuned on these rows, with a stepper's gradients where one is given."""
    trainer = DefendedTrainer(
        own_copy(start),
        nested_settings(context.args, folder, **changed),
        train_dataset=text_only(dataset),
        processing_class=context.tokenizer,
        peft_config=copy.deepcopy(context.peft_config),
        policy="sft",
        stepper=stepper,
        safe_data=context.safe_data,
        harmful_data=context.harmful_data,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found: Model = trainer.model
    return found


def merged(model: Model) -> PreTrainedModel:
    """The model with its adapter added into the weights; a model without one as it is."""
    if not isinstance(model, PeftModel):
        return model
    whole = model.merge_and_unload()
    if not isinstance(whole, PreTrainedModel):
        raise ValueError("the adapter's base is not a language model")
    return whole
