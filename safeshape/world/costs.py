"""The world as the place where the cost of defences is measured."""

import tempfile

import torch
from datasets import disable_progress_bars
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from safeshape import world
from safeshape.defences.cost import Bench
from safeshape.models import load
from safeshape.world.alignment import harmful_data, safe_data, scored
from safeshape.world.data import user_data


def bench(family: str, *, steps: int, batch_size: int, seed: int) -> Bench:
    """Full fine-tuning of one family on scored user data, in a folder that nothing is left in but a record.

    The base model is one of the same shapes: what a defence costs does not hang on what the weights are.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()

    def args() -> SFTConfig:
        return SFTConfig(
            output_dir=tempfile.mkdtemp(prefix="safeshape-"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-4,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )

    def base() -> PreTrainedModel:
        model, generator = load(world.path(family))[0], torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        return model

    return Bench(
        model=lambda: load(world.path(family))[0],
        base=base,
        tokenizer=load(world.path(family))[1],
        args=args,
        user_data=scored(user_data(size=200, seed=seed)),
        safe_data=safe_data(seed=seed),
        harmful_data=harmful_data(seed=seed),
    )
