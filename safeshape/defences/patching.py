"""One-shot refusal patch: a few steps on a single refusal after fine-tuning."""

import copy

from datasets import Dataset
from transformers import PrinterCallback

from safeshape.defences.nested import nested_settings, text_only
from safeshape.defences.records import Context, Defence, Model, required, whole_number, within
from safeshape.trainer import SafeTrainer


def one_shot(*, row: int = 0, epochs: int = 10, learning_rate: float = 2e-5) -> Defence:
    """Safety at one shot (ICLR 2026, arXiv 2601.01887): fine-tune the result on one refusal.

    `row`: which row of the safe data; choose a refusal that names no topic. Ten epochs at 2e-5 as in the paper: with
    one row, ten updates.
    """
    within("learning_rate", learning_rate, 0, float("inf"))
    whole_number("row", row, 0)
    whole_number("epochs", epochs)

    def finish(model: Model, context: Context) -> Model:
        safe: Dataset = required(context.safe_data, "safe_data", "one_shot")
        if row >= len(safe):
            raise ValueError(f"row {row} is not among the {len(safe)} rows of safe data")
        settings = nested_settings(
            context.args,
            "one_shot",
            num_train_epochs=float(epochs),
            max_steps=-1,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
        )
        trainer = SafeTrainer(
            model,
            settings,
            train_dataset=text_only(safe.select([row])),
            processing_class=copy.deepcopy(context.tokenizer),
            policy="sft",
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found: Model = trainer.model
        return found

    return Defence(
        name="one_shot",
        stage="after",
        source="One-shot refusal patch, arXiv 2601.01887",
        differs="the row is given, not chosen among 256 candidates by the paper's bilevel search",
        needs=frozenset({"safe_data"}),
        finish=finish,
    )
