"""Batched generation with a chat model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safeshape.models.loading import evaluation_mode

Conversation = Sequence[Mapping[str, Any]]


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts, batched by length.

    `progress` is called with (answered, total). Errors: ValueError for an empty conversation.
    """
    texts = [str(tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True)) for p in prompts]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return generate_from(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )


def generate_from(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers to prompts that are tokens already. Errors: ValueError for a prompt without tokens."""
    encoded = [list(ids) for ids in prompts]
    if not all(encoded):
        raise ValueError("a prompt has no tokens")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    # Not inference mode: buffers that a model makes in it (rotary tables) could not be trained with afterwards.
    with torch.no_grad(), evaluation_mode(model):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            width = max(len(encoded[row]) for row in rows)
            ids = torch.tensor(
                [[pad] * (width - len(encoded[row])) + encoded[row] for row in rows], device=model.device
            )
            mask = torch.tensor(
                [[0] * (width - len(encoded[row])) + [1] * len(encoded[row]) for row in rows], device=model.device
            )
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
            progress(min(begin + batch_size, len(order)), len(order))
    return answers
