"""Samples from a model exactly as it is, and the divergence of two models over whole answers.

Shape suffixes: B rows, L tokens of the padded batch, N answer tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safeshape.losses import log_softmax
from safeshape.models import Head, evaluation_mode, project, read_head
from safeshape.models.generation import Conversation
from safeshape.models.reference import causal_model

_TOKENS = 256  # answer tokens whose full logits are held at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer drawn from a model: the prompt's tokens, the answer's with its end token, and its text.

    `capped`: it did not end by itself within the allowed tokens.
    """

    prompt: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    text: str
    capped: bool


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer, as generation takes them. Errors: ValueError where there is none."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise ValueError("neither the model nor its tokenizer says which token ends an answer")
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    # What is None here would be filled in from the model's own settings (a temperature, top-p, a penalty ...).
    ends = end_tokens(model, tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        eos_token_id=list(ends),
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> list[Sample]:
    """Answers at temperature 1 from the whole vocabulary, `samples` of each prompt, in the order of the prompts.

    Whatever decoding the model's own generation settings ask for is set aside, and that nothing is left of it is
    checked on every batch. The seed repeats the answers for the same batch size.
    Errors: ValueError for a prompt without tokens, or where generation changes the model's distribution after all.
    """
    texts = [str(tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True)) for p in prompts]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not all(encoded):
        raise ValueError("a prompt has no tokens")
    settings = _plain(model, tokenizer, max_new_tokens)
    wanted = [index for index in range(len(encoded)) for _ in range(samples)]
    order = sorted(range(len(wanted)), key=lambda place: len(encoded[wanted[place]]))
    found: dict[int, Sample] = {}
    with torch.random.fork_rng(), torch.inference_mode(), evaluation_mode(model):
        torch.manual_seed(seed)
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            rows = [list(encoded[wanted[place]]) for place in places]
            for place, row, ids in zip(places, rows, _generate(model, rows, settings), strict=True):
                capped = ids[-1] not in settings.eos_token_id
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                found[place] = Sample(
                    prompt=wanted[place], prompt_ids=tuple(row), answer_ids=tuple(ids), text=text, capped=capped
                )
            progress(len(found), len(wanted))
    return [found[place] for place in range(len(wanted))]


def _generate(model: PreTrainedModel, rows: Sequence[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The new tokens of each row, up to its first end token."""
    width, pad = max(map(len, rows)), settings.pad_token_id
    ids_BL = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    told = {"max_new_tokens": 1, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    first = GenerationConfig(**{**settings.to_dict(), **told})
    probe = model.generate(input_ids=ids_BL[:1], attention_mask=mask_BL[:1], generation_config=first)
    if not torch.equal(probe.scores[0], probe.logits[0]):
        raise ValueError(
            "the model's generation settings change its distribution; samples must be from the model itself"
        )
    out_BL = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=settings)[:, width:]
    found = []
    for row in out_BL.tolist():
        end = next((place for place, token in enumerate(row) if token in settings.eos_token_id), len(row) - 1)
        found.append(row[: end + 1])
    return found


def sequence_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    progress: Progress = lambda done, total: None,
) -> list[float]:
    """KL(policy || reference) along each answer, in nats: full-vocabulary KL of every step, summed over its tokens.

    For answers drawn from the policy the mean is an unbiased estimate of the divergence over whole answers, by the
    chain rule; for answers cut at a cap, of the divergence over answers cut there. One forward of each model a batch;
    full logits are held for 256 tokens at a time.
    Errors: ValueError where the output layer as read does not give a model's own logits, or the policy knows tokens
    that the reference does not.
    """
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].prompt_ids + samples[place].answer_ids))
    sums = [0.0] * len(samples)
    with torch.inference_mode(), evaluation_mode(policy), evaluation_mode(reference):
        if samples:
            _check_head(policy, samples[0])
            _check_head(reference, samples[0])
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            chosen = [samples[place] for place in places]
            (hidden_NH, head), (ref_hidden_NH, ref_head) = (_states(model, chosen) for model in (policy, reference))
            kl_N = torch.cat(
                [
                    step_kl(project(head, hidden), project(ref_head, ref_hidden.to(hidden.device)))
                    for hidden, ref_hidden in zip(_pieces(hidden_NH), _pieces(ref_hidden_NH), strict=True)
                ]
            )
            ends = list(accumulate(len(sample.answer_ids) for sample in chosen))
            for place, start, end in zip(places, [0, *ends], ends, strict=False):
                sums[place] = float(kl_N[start:end].double().sum())
            progress(min(begin + batch_size, len(order)), len(order))
    return sums


def _pieces(hidden_NH: torch.Tensor) -> list[torch.Tensor]:
    return [hidden_NH[start : start + _TOKENS] for start in range(0, len(hidden_NH), _TOKENS)]


def step_kl(logits_NV: torch.Tensor, ref_logits_NV: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of each row, in nats.

    The reference may have more rows at the end of its vocabulary; the policy may not have ones that it lacks, because
    the divergence would be infinite.
    """
    if logits_NV.shape[-1] > ref_logits_NV.shape[-1]:
        raise ValueError(
            f"the policy has {logits_NV.shape[-1]} tokens and the reference {ref_logits_NV.shape[-1]}: a token that "
            "only the policy can say makes the divergence infinite"
        )
    logp_NV = log_softmax(logits_NV)
    # Over the reference's whole vocabulary: what it gives to tokens that the policy lacks is not the policy's.
    ref_logp_NV = log_softmax(ref_logits_NV)[:, : logits_NV.shape[-1]].to(logp_NV)
    return F.kl_div(ref_logp_NV, logp_NV, log_target=True, reduction="none").sum(-1)


def _inputs(model: nn.Module, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The padded batch, and which positions predict a token of an answer (B, L - 1)."""
    device = causal_model(model).device
    ids_BL = pad_sequence([torch.tensor(s.prompt_ids + s.answer_ids) for s in samples], batch_first=True)
    mask_BL = pad_sequence([torch.ones(len(s.prompt_ids + s.answer_ids)).long() for s in samples], batch_first=True)
    starts_B1 = torch.tensor([[len(s.prompt_ids)] for s in samples])
    answer_BT = (torch.arange(1, ids_BL.shape[1]) >= starts_B1) & mask_BL[:, 1:].bool()
    return {"input_ids": ids_BL.to(device), "attention_mask": mask_BL.to(device)}, answer_BT.to(device)


def _states(model: nn.Module, samples: Sequence[Sample]) -> tuple[torch.Tensor, Head]:
    forward, answer_BT = _inputs(model, samples)
    causal = causal_model(model)
    # The decoder alone: adapters are within its layers, and the model's own forward would build all logits.
    states_BLH = causal.base_model(**forward, use_cache=False).last_hidden_state
    return states_BLH[:, :-1][answer_BT], read_head(causal)


def _check_head(model: nn.Module, sample: Sample) -> None:
    forward, answer_BT = _inputs(model, [sample])
    own_NV = model(**forward, use_cache=False).logits[:, :-1][answer_BT].float()
    hidden_NH, head = _states(model, [sample])
    read_NV = project(head, hidden_NH)
    if own_NV.shape != read_NV.shape or not torch.allclose(own_NV, read_NV, atol=3e-2, rtol=3e-2):
        raise ValueError(f"{type(causal_model(model)).__name__}: the output layer as read does not give its own logits")
