"""An alarm for training that looks like safety training and is not: weights, masks or a reference without effect."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeshape.policies import Batch, Policy
from safeshape.types import Weights

logger = logging.getLogger("safeshape")

Alarm = Literal["equal_weights", "no_tokens", "zero_weights", "reference_moves", "still"]
_WHAT: dict[Alarm, str] = {
    "equal_weights": "the cross-entropy weights of all tokens have been equal for {patience} steps: the scores say "
    "nothing, and this is training without a signal",
    "no_tokens": "no token has counted for {patience} steps: everything is masked",
    "zero_weights": "every weight has been zero for {patience} steps: nothing is learned and nothing is held",
    "reference_moves": "the divergence is exactly 0 although the weights have moved and it has a weight: the reference "
    "moves with the model (is the adapter off when the reference runs?)",
    "still": "no trainable weight has moved in {patience} steps: the learning rate is 0 or the optimizer holds other "
    "parameters",
}


@dataclass
class _Seen:
    """Extremes of the weights over the counted tokens since the window began; None before the first token."""

    calls: int = 0
    tokens: int = 0
    steps: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    kl_high: float = float("-inf")


class InertAlarm(TrainerCallback):  # type: ignore[misc]
    """Looks at what the policy weighs, at the logged divergence and at the weights; says once what has no effect.

    Alarms: equal cross-entropy weights although the policy needs a signal; no counted token; all weights zero; a
    divergence of exactly 0 after the weights moved while it has a weight; trainable weights that do not move. Skipped
    updates (see `GradientFloor`) explain weights and a divergence that stand still, and raise no alarm.
    `patience`: steps over which it must be so. `action`: "warn", or "error", which ends training with a RuntimeError.
    Attach it with `attach(trainer)`: it listens to the trainer's policy. `fired` holds the alarms so far.
    """

    def __init__(self, *, patience: int = 20, action: Literal["warn", "error"] = "warn") -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if action not in ("warn", "error"):
            raise ValueError(f"action must be warn or error, got {action!r}")
        self.patience, self.action = patience, action
        self.fired: list[Alarm] = []
        self._needs_signal = False
        self._seen = _Seen()
        self._start: list[tuple[float, float]] = []
        self._begun = 0
        self._zero_kl = 0
        self._moved = False

    def attach(self, trainer: Any) -> "InertAlarm":
        """Listen to a SafeTrainer: its policy's weights pass through here, unchanged."""
        policy: Policy = trainer.policy
        self._needs_signal = policy.needs_signal
        function = policy.function

        def heard(p_safe_BT: torch.Tensor, *, batch: Batch, **parameters: Any) -> Weights:
            weights: Weights = function(p_safe_BT, batch=batch, **parameters)
            self._hear(weights, batch)
            return weights

        trainer.policy = replace(policy, function=heard)
        trainer.add_callback(self)
        return self

    def _hear(self, weights: Weights, batch: Batch) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation between steps
        self._seen.calls += 1
        counted_BT = batch.position_BT > 0
        ce_N, kl_N = weights.ce_BT[counted_BT], weights.kl_BT[counted_BT]
        if len(ce_N):
            # One transfer for all three: the host would otherwise wait for the device three times.
            low, high, kl = torch.stack([ce_N.min(), ce_N.max(), kl_N.max()]).tolist()
            seen = self._seen
            seen.low, seen.high, seen.kl_high = min(seen.low, low), max(seen.high, high), max(seen.kl_high, kl)
            seen.tokens += len(ce_N)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer when everything is prepared."""
        self._start, self._begun = _sums(kwargs["model"]), state.global_step
        self._seen, self._zero_kl, self._moved = _Seen(), 0, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer after each update."""
        seen = self._seen
        seen.steps += 1
        if seen.steps < self.patience:
            return
        self._seen = _Seen()
        if seen.calls == 0:
            return  # the gradients are not the policy's (a stepper makes them), so nothing is known of its weights
        if seen.tokens == 0:
            self._ring("no_tokens", state)
        elif seen.low == seen.high == 0 and seen.kl_high <= 0:
            self._ring("zero_weights", state)
        elif seen.low == seen.high and self._needs_signal:
            self._ring("equal_weights", state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer with its numbers: the divergence, its weight, the share of skipped updates."""
        if not logs or "skipped_updates" not in logs or state.global_step - self._begun < self.patience:
            return
        if logs["skipped_updates"] > 0 and logs["skipped_updates"] * state.global_step > state.global_step - 1.5:
            return  # no update, or only the last one, was made: nothing can have moved
        self._moved = self._moved or _sums(kwargs["model"]) != self._start
        moved = self._moved
        if not moved and self._start:
            self._ring("still", state)
        held = logs.get("kl_weight", 0.0) > 0 and "kl" in logs
        self._zero_kl = self._zero_kl + 1 if held and logs["kl"] == 0.0 and moved else 0
        # One such log may be of steps before the weights moved; the second is not.
        if self._zero_kl >= 2:
            self._ring("reference_moves", state)

    def _ring(self, alarm: Alarm, state: TrainerState) -> None:
        if alarm in self.fired:
            return
        self.fired.append(alarm)
        text = f"step {state.global_step}: {_WHAT[alarm].format(patience=self.patience)}"
        if self.action == "error":
            raise RuntimeError(text)
        logger.warning("%s", text)


def _sums(model: nn.Module) -> list[tuple[float, float]]:
    """Two sums of each trainable tensor's own numbers, in double precision; none where an engine holds the weights."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel():
            held = parameter.detach()
            local = held.to_local() if isinstance(held, DTensor) else held
            # Sums in double precision of single-precision numbers: a copy of the largest matrix would be gigabytes.
            norm = torch.linalg.vector_norm(local, dtype=torch.float64)
            found.append((float(local.sum(dtype=torch.float64)), float(norm)))
    return found
