"""The on-policy risk: every few steps the current and the reference model answer the batch's prompts, and are judged.

Training goes on while the judge works: verdicts are taken when they are there, and how old they are is logged.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.caching import model_hash
from safeshape.data import as_messages, last_turns, prompt_ids
from safeshape.models import Cached, Frozen, Reference
from safeshape.models.generation import generate_from
from safeshape.models.reference import answering
from safeshape.policies import Policy
from safeshape.signals.judges import Judging
from safeshape.store import Store, content_key
from safeshape.types import IGNORE, Judgement

logger = logging.getLogger("safeshape")
Batch = dict[str, Any]  # a collated micro-batch


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """How a run judges its own answers: an argument of SafeTrainer.

    `every`: optimiser steps from one round to the next. `wait_s`: the longest that one step waits for verdicts; 0 never
    waits. `max_new_tokens`: of an answer, which is greedy. `degradation`: see `risk_of`. `store`: keeps the reference's
    answers for later runs.
    Errors: ValueError that names the setting.
    """

    judge: Judging
    every: int = 50
    wait_s: float = 0.0
    max_new_tokens: int = 128
    degradation: float = 1.0
    store: Store | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.max_new_tokens < 1:
            raise ValueError("every and max_new_tokens of on-policy judging must be at least 1")
        if not self.wait_s >= 0 or not self.degradation >= 0:
            raise ValueError("wait_s and degradation of on-policy judging must be at least 0")

    def identity(self) -> dict[str, Any]:
        """What decides the risk; how long a step waits does not belong to it."""
        return {
            "judge": self.judge.identity(),
            "every": self.every,
            "max_new_tokens": self.max_new_tokens,
            "degradation": self.degradation,
        }


def risk_of(score: int, reference: int, degradation: float = 1.0) -> float:
    """The risk of a prompt from the judge's scores (1 to 5) of the current and the reference model's answers to it.

    With h = (score - 1) / 4: min(1, h + degradation * max(0, h - h_reference)). An answer that the judge finds safe
    has risk 0 whatever the reference does, so what is safe is learned freely. Harm is risk, and harm that the reference
    did not do, which is what training broke and what the reference can hold, counts again. `degradation=0` leaves h.
    Source: arXiv 2602.17546 lets a judge score the answers of both models; it gives no formula for the two.
    """
    harm, before = (score - 1) / 4, (reference - 1) / 4
    return min(1.0, harm + degradation * max(0.0, harm - before))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One prompt of the open round. `reference`: the verdict on the reference's answer, awaited or known already."""

    row: int
    prompt: str
    current: "Future[Judgement]"
    reference: "Future[Judgement] | int"

    def futures(self) -> list["Future[Judgement]"]:
        return [self.current] if isinstance(self.reference, int) else [self.current, self.reference]


@dataclass(kw_only=True)
class Verdicts:
    """What the judge has said so far; the same in every process, and saved in checkpoints.

    `by_row`: risk of a training row's prompt and the step at which it was answered. `reference`: scores of the
    reference's answers, by prompt. `mean`: risk of the newest finished round, answered at step `mean_step`. `due`: the
    step at which the next round begins. `judged`, `failed`: prompts with and without a verdict, over all rounds.
    """

    by_row: dict[int, tuple[float, int]] = field(default_factory=dict)
    reference: dict[str, int] = field(default_factory=dict)
    mean: float | None = None
    mean_step: int | None = None
    due: int = 0
    rounds: int = 0
    judged: int = 0
    failed: int = 0


class OnPolicyRisk:
    """Runs the rounds of a training run and sets their risk into its batches.

    One round is open at a time: while verdicts are awaited no other begins, so a slow judge is asked less often and
    never floods. A failed judgement is counted and leaves the row's risk as it was. `scored`: whether the data have
    scores of their own, which stand for rows without a verdict.
    """

    def __init__(self, settings: OnPolicy, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, scored: bool) -> None:
        self.settings, self.scored = settings, scored
        self.verdicts = Verdicts()
        self._rows, self._tokenizer = rows, tokenizer
        self._asked: list[_Asked] = []
        self._round: dict[int, float] = {}  # risks of the open round, of all processes
        self._opened: int | None = None  # the step at which the open round was answered
        self._answers: dict[str, str] = {}  # of a reference that is gone
        self._maker: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "decoding": "greedy"}
        self._step = 0
        self._seen = self._own = self._age = 0  # examples since the last log, those with a verdict, its steps

    # -- rounds ---------------------------------------------------------------------------------------------------

    def update(self, step: int, batches: Sequence[Batch], model: nn.Module, reference: Reference) -> None:
        """Before an optimiser step: take what the judge has said, begin a round where one is due, and set the risks.

        Every process calls it at every step; it waits for verdicts at most once.
        """
        self._step = step
        if self._opened is not None and step >= self.verdicts.due:
            self._take(0.0)
        if self._opened is None and step >= self.verdicts.due:
            self._begin(step, batches, model, reference)
        if self._opened is not None:
            self._take(self.settings.wait_s)
        for batch in batches:
            self.write(batch, step)

    def _begin(self, step: int, batches: Sequence[Batch], model: nn.Module, reference: Reference) -> None:
        rows = sorted({row for batch in batches for row in rows_of(batch) if row >= 0})
        ids = [prompt_ids(self._rows[row], self._tokenizer) for row in rows]
        current = self._generate(model, ids)
        prompts = [_digest(one) for one in ids]
        unknown = {p: one for p, one in zip(prompts, ids, strict=True) if p not in self.verdicts.reference}
        self.know(unknown, model, reference)
        for row, prompt, answer in zip(rows, prompts, current, strict=True):
            known = self.verdicts.reference.get(prompt)
            asked = self._submit(row, self._answers[prompt]) if known is None else known
            self._asked.append(_Asked(row=row, prompt=prompt, current=self._submit(row, answer), reference=asked))
        self._opened, self._round = step, {}
        self.verdicts.rounds += 1
        self.verdicts.due = step + self.settings.every

    def _submit(self, row: int, answer: str) -> "Future[Judgement]":
        messages = as_messages(dict(self._rows[row]))[:-1]
        plain = [{"role": str(m["role"]), "content": m["content"]} for m in messages]
        return self.settings.judge.submit([*plain, {"role": "assistant", "content": answer}])

    def _take(self, wait_s: float) -> None:
        """Take the verdicts that are there, from all processes, and close the round when none is awaited any more."""
        if wait_s > 0:
            wait([future for asked in self._asked for future in asked.futures()], timeout=wait_s)
        mine, awaited = [], []
        for asked in self._asked:
            if all(future.done() for future in asked.futures()):
                mine.append((asked.row, asked.prompt, _score(asked.current), _score(asked.reference)))
            else:
                awaited.append(asked)
        self._asked = awaited
        gathered = gather_object([(mine, len(awaited))])
        found, step = self.verdicts, self._opened
        if step is None:
            raise RuntimeError("no round is open")
        for row, prompt, score, reference in (entry for theirs, _ in gathered for entry in theirs):
            if reference is not None:
                found.reference[prompt] = reference
                self._answers.pop(prompt, None)
            if score is None or reference is None:
                found.failed += 1
                continue
            risk = risk_of(score, reference, self.settings.degradation)
            found.judged += 1
            found.by_row[row], self._round[row] = (risk, step), risk
        if not any(left for _, left in gathered):
            self._opened = None
            if self._round:
                found.mean, found.mean_step = sum(self._round.values()) / len(self._round), step

    def stop(self) -> None:
        """Await nothing any more."""
        for asked in self._asked:
            for future in asked.futures():
                future.cancel()
        self._asked, self._opened = [], None

    # -- answers --------------------------------------------------------------------------------------------------

    def start(self, model: nn.Module, reference: Reference, accelerator: Accelerator) -> None:
        """Once, before the first step, from the starting model.

        Where training leaves no reference that could answer later (stored states of a full model), it answers every
        prompt now, shared out among the processes.
        """
        kept = reference.model if isinstance(reference, Frozen) else model
        if self.settings.store is not None:
            self._maker["reference"] = model_hash(kept, accelerator)
        if not isinstance(reference, Cached) or reference.frozen_head is None:
            return
        ids = [prompt_ids(row, self._tokenizer) for row in self._rows]
        prompts = [(p, one) for p, one in {_digest(one): one for one in ids}.items()]
        wanted = [(prompt, one) for prompt, one in prompts if prompt not in self.verdicts.reference]
        logger.info("the starting model answers %d prompts", len(wanted))
        self.know(dict(wanted[accelerator.process_index :: accelerator.num_processes]), model, None)
        for answers in gather_object([self._answers]):
            self._answers |= answers

    def know(self, prompts: Mapping[str, list[int]], model: nn.Module, reference: Reference | None) -> None:
        """Have the reference's answer to each prompt: from earlier, from the store, or by generating it now."""
        wanted = {prompt: ids for prompt, ids in prompts.items() if prompt not in self._answers}
        store = self.settings.store
        keys = {content_key(ids, self._maker): prompt for prompt, ids in wanted.items()}
        if store is not None:
            for key, answer in store.get_many("generations", list(keys)).items():
                self._answers[keys[key]] = answer["answer"]
        missing = [(key, prompt) for key, prompt in keys.items() if prompt not in self._answers]
        if not missing:
            return
        with answering(reference, model) as answerer:
            answers = self._generate(answerer, [wanted[prompt] for _, prompt in missing])
        self._answers.update(zip((prompt for _, prompt in missing), answers, strict=True))
        if store is not None:
            store.put_many(
                "generations",
                {key: {"answer": answer} for (key, _), answer in zip(missing, answers, strict=True)},
            )

    def _generate(self, model: nn.Module, prompts: Sequence[list[int]]) -> list[str]:
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise TypeError(f"{type(model).__name__} is not a transformers model and cannot answer")
        return generate_from(model, self._tokenizer, prompts, max_new_tokens=self.settings.max_new_tokens)

    # -- risk -----------------------------------------------------------------------------------------------------

    def write(self, batch: Batch, step: int | None = None) -> None:
        """Set the risk of each example into a batch, in place of its scores, on the tokens of its last turn.

        A row's own verdict comes first; then the data's score where they have scores, else the mean of the newest
        finished round; before that 1, so that nothing unknown is learned freely. `step`: of training, for the log.
        """
        for (row, begin, end), index in zip(last_turns(batch), rows_of(batch), strict=True):
            if step is not None:
                own = self.verdicts.by_row.get(index)
                self._seen, self._own = self._seen + 1, self._own + (own is not None)
                self._age += 0 if own is None else step - own[1]
            risk = self._known(index)
            if risk is None:
                continue
            counted = batch["labels"][row, begin:end] != IGNORE
            for name in ("p_safe", "answer_p_safe"):
                batch[name][row, begin:end][counted] = 1.0 - risk

    def _known(self, index: int) -> float | None:
        """Risk of a training row (-1: of another), None where its own scores stand."""
        if index in self.verdicts.by_row:
            return self.verdicts.by_row[index][0]
        if self.scored:
            return None
        return 1.0 if self.verdicts.mean is None else self.verdicts.mean

    def batch_risk(self, risk: float) -> float:
        """The risk of the optimisation batch: the newest finished round's, before it its examples' mean `risk`."""
        return risk if self.verdicts.mean is None else self.verdicts.mean

    @property
    def begun(self) -> bool:
        """Whether the risk rests on anything: scores in the data, or a finished round."""
        return self.scored or self.verdicts.mean is not None

    # -- record ---------------------------------------------------------------------------------------------------

    def logged(self) -> dict[str, float]:
        """What is logged beside the losses.

        `judge/staleness`: how many steps before the last update the round in use was answered. `judge/own`: share of
        this process's examples since the last log with a verdict of their own; `judge/own_staleness`: its mean age.
        """
        found = self.verdicts
        numbers: dict[str, float] = {
            "judge/rounds": found.rounds,
            "judge/judged": found.judged,
            "judge/failed": found.failed,
            "judge/awaited": len(self._asked),
        }
        if found.mean is not None and found.mean_step is not None:
            numbers |= {"judge/risk": found.mean, "judge/staleness": self._step - found.mean_step}
        if self._seen:
            numbers["judge/own"] = self._own / self._seen
        if self._own:
            numbers["judge/own_staleness"] = self._age / self._own
        self._seen = self._own = self._age = 0
        return numbers

    def state(self) -> dict[str, Any]:
        """The verdicts as JSON. A round that is still open is not in it: the run that resumes begins it again."""
        found = vars(self.verdicts)
        by_row = {str(row): list(entry) for row, entry in self.verdicts.by_row.items()}
        due = self.verdicts.due if self._opened is None else self._opened
        return {**found, "by_row": by_row, "reference": dict(self.verdicts.reference), "due": due}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        by_row = {int(row): (float(risk), int(step)) for row, (risk, step) in state["by_row"].items()}
        self.verdicts = Verdicts(**{**state, "by_row": by_row, "reference": dict(state["reference"])})


@dataclass(kw_only=True)
class Smoothed:
    """The risk of successive optimisation batches, s_t = ema * s_{t-1} + (1 - ema) * risk_t.

    `value`: the average so far, kept in checkpoints; the first known risk starts it: the paper gives no initial value.
    """

    ema: float
    value: float | None = None

    def next(self, risk: float, critic: OnPolicyRisk | None) -> float:
        """The risk to use, from the mean `risk` of the batch's examples, or the critic's where there is one.

        What the critic assumes before its first verdict is used, but does not enter the average.
        """
        if critic is not None:
            risk = critic.batch_risk(risk)
            if not critic.begun:
                return risk
        self.value = risk if self.value is None else self.ema * self.value + (1 - self.ema) * risk
        return self.value


def rows_of(batch: Batch) -> list[int]:
    """Which training row each example of a batch is, in the order of `last_turns`; -1 where it is none."""
    index_BL = batch.get("row_index")
    turns = last_turns(batch)
    return [-1 if index_BL is None else int(index_BL[row, begin]) for row, begin, _ in turns]


def numbered(dataset: Dataset) -> Dataset:
    """The dataset with a column `row_index` beside the labels, so that packed and shuffled rows know what they are."""
    return dataset.map(
        lambda labels, row: {"row_index": [row] * len(labels)},
        with_indices=True,
        input_columns=["labels"],
        desc="Numbering rows",
    )


def refuse_on_policy(policy: Policy, dataset: Any, *, probe: bool, prepared: bool) -> None:
    """Errors: ValueError in one sentence for runs that cannot judge their own answers."""
    reasons = {
        f"policy {policy.name!r} does not use a risk": not policy.needs_signal,
        f"policy {policy.name!r} keeps no reference to compare with": not policy.needs_reference,
        "the probe gives the risk already; give one of them": probe,
        "it needs a dataset with a length; a stream has none": not isinstance(dataset, Dataset),
        "it needs the rows' text, and the dataset holds tokens only": prepared,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(f"on-policy judging is not possible: {reason}")


def _score(verdict: "Future[Judgement] | int") -> int | None:
    """The score of a finished judgement, None where it failed."""
    if isinstance(verdict, int):
        return verdict
    if verdict.cancelled() or verdict.exception() is not None:
        logger.warning("a judgement failed: %s", "it was cancelled" if verdict.cancelled() else verdict.exception())
        return None
    return verdict.result().score


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()[:32]
