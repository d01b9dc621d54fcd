"""Batched generation with a chat model, greedy or sampled.

Shape suffixes: B rows of a batch, L tokens of the padded batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from safeshape.models.loading import evaluation_mode

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), cut to the likeliest that make up `top_p`.

    Errors: ValueError for a temperature that is not above 0, or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0 to sample, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Sampling as an argmax: log-probabilities plus Gumbel noise, each row's from a generator of its own.

    So a row's answer does not depend on which rows share its batch, and a run that is taken up again draws the same.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device=device).manual_seed(seed % 2**63) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = torch.stack(
            [
                torch.empty(scores.shape[-1], device=scores.device).exponential_(generator=generator)
                for generator in self.generators
            ]
        )
        return scores.float() - noise_BV.clamp_min(torch.finfo(torch.float32).tiny).log()


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Answers in the order of the prompts, batched by length; see `generate_batches`."""
    answers, done = [""] * len(prompts), 0
    batches = generate_batches(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        seeds=seeds,
    )
    for batch in batches:
        for row, answer in batch.items():
            answers[row] = answer
        done += len(batch)
        progress(done, len(prompts))
    return answers


def generate_batches(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[dict[int, str]]:
    """The answers of one batch after the other, by the number of their prompt; shortest prompts first.

    A conversation that ends with an assistant message has that message continued; its answer is the whole message, the
    beginning that was given included. `sampling` None: greedy. `seeds`: one for each prompt, needed to sample.
    Errors: ValueError for an empty conversation, and for sampling without seeds.
    """
    if (sampling is None) != (seeds is None) or (seeds is not None and len(seeds) != len(prompts)):
        raise ValueError("sampling needs a seed for every prompt, and greedy answers need none")
    if not prompts:
        return
    begun = [str(p[-1]["content"]) if p and p[-1]["role"] == "assistant" else None for p in prompts]
    texts = [_prompt_text(tokenizer, p, given is not None) for p, given in zip(prompts, begun, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    batches = _new_tokens(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        seeds=seeds,
    )
    for batch in batches:
        answers = dict(zip(batch, tokenizer.batch_decode(list(batch.values()), skip_special_tokens=True), strict=True))
        for row, tokens in batch.items():
            given = begun[row]
            if given is None:
                answers[row] = answers[row].strip()
            else:
                shown = given if texts[row].endswith(given) else given.strip()  # some templates strip messages
                answers[row] = (shown + _continuation(tokenizer, encoded[row], tokens)).rstrip()
        yield answers


def generate_from(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers to prompts that are tokens already. Errors: ValueError for a prompt without tokens."""
    answers = [""] * len(prompts)
    encoded = [list(ids) for ids in prompts]
    for batch in _new_tokens(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size):
        decoded = tokenizer.batch_decode(list(batch.values()), skip_special_tokens=True)
        for row, text in zip(batch, decoded, strict=True):
            answers[row] = text.strip()
    return answers


def _new_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[dict[int, list[int]]]:
    """What the model adds to each row, padding after the end included, by the row's number; one batch at a time."""
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
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        ids_BL, mask_BL = _padded([encoded[row] for row in rows], pad, model.device)
        # Not inference mode: buffers that a model makes in it (rotary tables) could not be trained with afterwards.
        with torch.no_grad(), evaluation_mode(model):
            out_BL = model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                generation_config=settings,
                logits_processor=_drawing(sampling, None if seeds is None else [seeds[row] for row in rows], model),
            )
        yield dict(zip(rows, out_BL[:, ids_BL.shape[1] :].tolist(), strict=True))


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids_BL = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BL, mask_BL


def _drawing(sampling: Sampling | None, seeds: Sequence[int] | None, model: PreTrainedModel) -> LogitsProcessorList:
    if sampling is None or seeds is None:
        return LogitsProcessorList()
    cut = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(
        [TemperatureLogitsWarper(float(sampling.temperature)), *cut, _Drawn(seeds, model.device)]
    )


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
