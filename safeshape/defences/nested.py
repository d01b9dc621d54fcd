"""Training runs inside a defence: on other data, from the same start, under the same settings."""

import copy
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig

from safeshape.data import as_messages
from safeshape.defences.records import Context, Model
from safeshape.defences.stepping import Stepper
from safeshape.defences.trainer import DefendedTrainer
from safeshape.models.reference import frozen_copy


def messages_only(dataset: Dataset) -> Dataset:
    """The rows as conversations, without scores or other columns. Errors: ValueError that names the row."""
    rows = []
    for index, row in enumerate(dataset):
        try:
            rows.append({"messages": [{"role": m["role"], "content": m["content"]} for m in as_messages(row)]})
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
    return Dataset.from_list(rows)


def nested_settings(args: SFTConfig, folder: str, **changed: Any) -> SFTConfig:
    """The run's settings for a run inside it, which writes nothing but its own folder and never saves."""
    settings = copy.deepcopy(args)
    settings.output_dir = str(args.output_dir) + "/" + folder
    settings.save_strategy = "no"
    settings.eval_strategy = "no"
    settings.report_to = []
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
        train_dataset=messages_only(dataset),
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
