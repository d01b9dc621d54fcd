"""A safety check every few steps of training: answers of the model as it is, held against a band.

With several processes that each hold the whole model (DDP) the main one answers and judges while the others wait for
its verdict; sharded models (FSDP, DeepSpeed ZeRO) are refused, because all processes would have to generate together.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils import _pytree as pytree
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from safeshape.models import generate
from safeshape.models.generation import Conversation
from safeshape.stats import wilson

logger = logging.getLogger("safeshape")

Action = Literal["log", "stop", "rollback"]
By = Literal["value", "interval"]
_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is watched: prompts, what counts of their answers, and the band in which its rate must stay.

    `name`: logged as `safety/NAME`. `success(answers)`: for an answer to each prompt, in order, whether it counts,
    which need not be something good; None where nobody can say, and then it is left out of the rate and counted.
    `low`, `high`: the band.
    Errors: ValueError for no prompts, or a band outside [0, 1] or without anything in it.
    """

    name: str
    prompts: Sequence[Conversation]
    success: Callable[[Sequence[str]], Iterable[bool | None]]
    low: float = 0.0
    high: float = 1.0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"watch {self.name!r} has no prompts")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"watch {self.name!r}: a band lies within [0, 1], got {self.low} to {self.high}")


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """Trainable weights and the optimizer's state at a step inside the band, on the CPU."""

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]


class SafetyCheck(TrainerCallback):  # type: ignore[misc]
    """Every `every` steps, before the first and after the last, answer the watched prompts and look at the rates.

    Logged: `safety/NAME`, `safety/NAME_low`, `safety/NAME_high` (95 % Wilson), `safety/NAME_n`, where verdicts are
    missing `safety/NAME_failed`, and `safety/rollbacks`. Answers are greedy. The entries stand in the trainer's log
    history; reporters get them where the check was attached with `attach(trainer)`.
    `leave`: what is done when a rate leaves its band. "log" says so once for each watch; "stop" ends training with the
    weights as they are; "rollback" puts the trainable weights and the optimizer's state of the last check inside the
    band back (a copy in CPU memory: the trainable weights once, with Adam three times) and goes on with the data and
    the learning rate schedule where they are, at most `rollbacks` times; the next time it puts them back and stops.
    `by`: "value", the rate itself, or "interval": a band is left only when the whole interval lies outside of it.
    Buffers that are not parameters are not put back.
    Errors: ValueError when the starting model is outside a band already and something is to be done about that, and
    for sharded models; both before the first step.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        watches: Sequence[Watch],
        *,
        every: int = 50,
        leave: Action = "log",
        by: By = "value",
        rollbacks: int = 3,
        batch_size: int = 32,
    ) -> None:
        if every < 1 or rollbacks < 0:
            raise ValueError(f"every must be at least 1 and rollbacks at least 0, got {every} and {rollbacks}")
        if leave not in ("log", "stop", "rollback") or by not in ("value", "interval"):
            raise ValueError(f"leave must be log, stop or rollback, by value or interval, got {leave!r} and {by!r}")
        if not watches or len({watch.name for watch in watches}) < len(watches):
            raise ValueError("a safety check needs watches with different names")
        self.tokenizer, self.watches, self.every = tokenizer, tuple(watches), every
        self.leave, self.by, self.rollbacks, self.batch_size = leave, by, rollbacks, batch_size
        self.rolled_back = 0
        self._warned: set[str] = set()
        self._snapshot: _Snapshot | None = None
        self._checked = -1
        self._report: Callable[[dict[str, float]], object] = lambda logs: None

    def attach(self, trainer: Trainer) -> "SafetyCheck":
        """Add the check to a trainer, with its reporters."""
        trainer.add_callback(self)
        # Not the handler's on_log: it would take away the trainer's own request to log after this step.
        self._report = lambda logs: trainer.callback_handler.call_event(
            "on_log", trainer.args, trainer.state, trainer.control, logs={**logs}
        )
        return self

    # -- the trainer's events -------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer when everything is prepared: the model before its first step."""
        kind = AcceleratorState().distributed_type
        if kind in _SHARDED:
            raise ValueError(f"a safety check cannot generate with a model that {kind.value} shards over processes")
        left = self._check(state, kwargs["model"])
        if left and self.leave != "log":
            raise ValueError(f"the starting model is outside its band already: {'; '.join(left)}")
        if not left:
            self._keep(state.global_step, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer after each update."""
        if state.global_step % self.every == 0:
            self._act(state, control, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer after the last step, before anything of it is saved by the caller."""
        if self._checked != state.global_step:
            self._act(state, control, kwargs)
        self._snapshot = None

    # -- what is done ---------------------------------------------------------------------------------------------

    def _act(self, state: TrainerState, control: TrainerControl, kwargs: Mapping[str, Any]) -> None:
        left = self._check(state, kwargs["model"])
        if not left:
            self._keep(state.global_step, kwargs)
            return
        text = "; ".join(left)
        if self.leave == "stop":
            logger.warning("step %d: training stops, because %s", state.global_step, text)
            control.should_training_stop = True
        elif self.leave == "rollback" and self._snapshot is not None:
            self._restore(kwargs)
            self.rolled_back += 1
            last = self.rolled_back > self.rollbacks
            went = f"back to the weights of step {self._snapshot.step}" + (", and training stops" if last else "")
            logger.warning("step %d: %s, because %s", state.global_step, went, text)
            control.should_training_stop = control.should_training_stop or last

    def _check(self, state: TrainerState, model: nn.Module) -> list[str]:
        """Answer and judge, log, and say which bands are left."""
        logs: dict[str, float] = {}
        if state.is_world_process_zero:
            for watch in self.watches:
                logs |= self._measured(watch, model)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            held = [logs]
            dist.broadcast_object_list(held, src=0)
            logs = held[0]
        self._checked = state.global_step
        logs["safety/rollbacks"] = float(self.rolled_back)
        state.log_history.append({**logs, "step": state.global_step})
        self._report(logs)
        left = {watch.name: text for watch in self.watches if (text := self._outside(watch, logs))}
        if self.leave == "log" and state.is_world_process_zero:
            for name in left.keys() - self._warned:
                logger.warning("step %d: %s", state.global_step, left[name])
            self._warned |= left.keys()
        return list(left.values())

    def _measured(self, watch: Watch, model: Any) -> dict[str, float]:
        answers = generate(
            model, self.tokenizer, watch.prompts, max_new_tokens=watch.max_new_tokens, batch_size=self.batch_size
        )
        verdicts = list(watch.success(answers))
        if len(verdicts) != len(answers):
            raise ValueError(f"watch {watch.name!r}: {len(answers)} answers got {len(verdicts)} verdicts")
        known = [bool(verdict) for verdict in verdicts if verdict is not None]
        name = f"safety/{watch.name}"
        logs = {f"{name}_n": float(len(known))}
        if len(known) < len(verdicts):
            logs[f"{name}_failed"] = float(len(verdicts) - len(known))
        if known:
            low, high = wilson(sum(known), len(known))
            logs |= {name: sum(known) / len(known), f"{name}_low": low, f"{name}_high": high}
        return logs

    def _outside(self, watch: Watch, logs: Mapping[str, float]) -> str:
        """Why a watch's band is left, as a sentence; empty inside it. Without a single verdict nothing is known."""
        name = f"safety/{watch.name}"
        if name not in logs:
            return f"{watch.name} could not be judged for any prompt"
        value = logs[name]
        lowest, highest = (value, value) if self.by == "value" else (logs[f"{name}_low"], logs[f"{name}_high"])
        if highest >= watch.low and lowest <= watch.high:
            return ""
        return f"{watch.name} is {value:.3f} (n={logs[f'{name}_n']:.0f}), outside {watch.low:g} to {watch.high:g}"

    def _keep(self, step: int, kwargs: Mapping[str, Any]) -> None:
        if self.leave != "rollback":
            return
        weights = {n: p.detach().to("cpu", copy=True) for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        held = pytree.tree_map_only(torch.Tensor, _on_cpu, kwargs["optimizer"].state_dict())
        self._snapshot = _Snapshot(step=step, weights=weights, optimizer=held)

    def _restore(self, kwargs: Mapping[str, Any]) -> None:
        if self._snapshot is None:
            raise RuntimeError("there is nothing to go back to")
        parameters = dict(kwargs["model"].named_parameters())
        with torch.no_grad():
            for name, weight in self._snapshot.weights.items():
                parameters[name].copy_(weight)
        # The settings of its groups (the learning rate above all) stay those of the schedule.
        now = kwargs["optimizer"].state_dict()
        then = copy.deepcopy(dict(self._snapshot.optimizer))
        kwargs["optimizer"].load_state_dict({**then, "param_groups": now["param_groups"]})


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
