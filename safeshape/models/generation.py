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

    A conversation that ends with an assistant message has that message continued; its answer is the whole message, the
    beginning that was given included. `progress` is called with (answered, total).
    Errors: ValueError for an empty conversation.
    """
    begun = [str(p[-1]["content"]) if p and p[-1]["role"] == "assistant" else None for p in prompts]
    texts = [_prompt_text(tokenizer, p, given is not None) for p, given in zip(prompts, begun, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
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
    with torch.inference_mode(), evaluation_mode(model):
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
            decoded = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for row, text, new in zip(rows, decoded, out[:, width:].tolist(), strict=True):
                given = begun[row]
                if given is None:
                    answers[row] = text.strip()
                else:
                    shown = given if texts[row].endswith(given) else given.strip()  # some templates strip messages
                    answers[row] = (shown + _continuation(tokenizer, encoded[row], new)).rstrip()
            progress(min(begin + batch_size, len(order)), len(order))
    return answers


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, continued: bool) -> str:
    """What the model is given: up to where it answers, or up to the end of the answer that it goes on with."""
    return str(
        tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )
    )


def _continuation(tokenizer: PreTrainedTokenizerBase, before: list[int], new: list[int]) -> str:
    """The text that the new tokens add. Decoded alone they could lose the blank before their first word."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    head, whole = str(tokenizer.decode(before, **options)), str(tokenizer.decode([*before, *new], **options))
    if not whole.startswith(head):
        raise ValueError("the tokenizer decodes the beginning of an answer differently once it is continued")
    return whole[len(head) :]
