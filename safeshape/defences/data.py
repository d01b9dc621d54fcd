"""Defences that change the user's rows, or only what stands before a request: SafeInstruct, dropping, PTST."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from safeshape.data import conversation
from safeshape.defences.nested import text_only
from safeshape.defences.records import Context, Defence, NothingToTrain, generator, required, within
from safeshape.signals.align import read_safety

# Llama 2's default system prompt in one sentence; PTST's gains do not hang on its words.
SAFETY_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe, and "
    "refuse requests for anything harmful."
)


def safe_instruct(*, share: float = 0.05) -> Defence:
    """SafeInstruct (ICLR 2024, arXiv 2309.07875): rows of safe data, refusals among them, mixed into the user's.

    `share`: how many, as a share of the user's rows, drawn without repetition (the paper adds 100 to 2000 rows to
    20 000; about 3 % was enough there, and more made models refuse harmless requests).
    """
    within("share", share, 0, float("inf"))

    def prepare(dataset: Dataset, context: Context) -> Dataset:
        safe = required(context.safe_data, "safe_data", "safe_instruct")
        count = round(share * len(dataset))
        if count > len(safe):
            raise ValueError(f"share {share} of {len(dataset)} rows is {count} safe rows, and there are {len(safe)}")
        picked = torch.randperm(len(safe), generator=generator(context.args.seed))[:count].tolist()
        return text_only(dataset, safe.select(picked))

    return Defence(
        name="safe_instruct",
        stage="fine-tuning",
        source="SafeInstruct, arXiv 2309.07875",
        differs="the number is a share of the user's rows, so that it means the same at every size",
        needs=frozenset({"safe_data"}),
        prepare=prepare,
    )


def row_p_safe(row: Mapping[str, Any], index: int) -> float:
    """The score of a whole answer. Errors: ValueError that names the row without one."""
    try:
        if row.get("safety") is None:
            raise ValueError("has no `safety` score; score the data first")
        return read_safety(row["safety"])[0]
    except ValueError as error:
        raise ValueError(f"train row {index}: {error}") from error


def drop_risky(*, threshold: float = 0.5) -> Defence:
    """The control every method must beat: rows whose answer scores below the threshold are not trained on at all.

    Unlike the policy `rejection`, dropped rows do not count in the number of tokens, and take no step.
    """
    within("threshold", threshold, 0, 1)

    def prepare(dataset: Dataset, context: Context) -> Dataset:
        kept = [index for index, row in enumerate(dataset) if row_p_safe(row, index) >= threshold]
        if not kept:
            raise NothingToTrain(f"every row scores below {threshold}, so nothing is left to train on")
        return dataset.select(kept)

    return Defence(
        name="drop_risky",
        stage="fine-tuning",
        source="control: a filter with the same critic",
        needs=frozenset({"scores"}),
        scores_by=("guard", "judge", "probe"),
        prepare=prepare,
    )


def ptst(*, system_prompt: str = SAFETY_PROMPT) -> Defence:
    """PTST (NeurIPS 2024, arXiv 2402.18540): fine-tune without a safety prompt, serve the model with one.

    Errors while training: ValueError for rows that carry a system message already.
    """
    if not isinstance(system_prompt, str) or not system_prompt.strip():
        raise ValueError("system_prompt must be a text")

    def prepare(dataset: Dataset, context: Context) -> Dataset:
        for index, row in enumerate(dataset):
            if any(message["role"] == "system" for message in conversation(row) or ()):
                raise ValueError(f"train row {index}: has a system message; ptst trains without one")
        return dataset

    return Defence(
        name="ptst",
        stage="inference",
        source="PTST, arXiv 2402.18540",
        differs="the prompt is a short form of Llama 2's",
        prepare=prepare,
        system_prompt=system_prompt,
    )


def with_system_prompt(prompt: list[dict[str, str]], system_prompt: str | None) -> list[dict[str, str]]:
    """A conversation as a defended model is served: with its system prompt first, where it has one."""
    return prompt if system_prompt is None else [{"role": "system", "content": system_prompt}, *prompt]
