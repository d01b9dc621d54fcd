"""DefendedTrainer: SafeTrainer whose gradients a stepper makes, one whole optimisation batch at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeshape.data import tokens_seen
from safeshape.defences.stepping import ROW, Inputs, Loop, Pass, Stepper, Stream
from safeshape.provenance import RECORD, data_summary, last_complete_checkpoint
from safeshape.signals.align import prepare
from safeshape.steps import TokenMeans
from safeshape.trainer import SafeTrainer

STATE = "defence_state.safetensors"


class NumberedRows:
    """A collator that lets each row keep its number in the dataset, as `row_number` (B,)."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Inputs]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> Inputs:
        batch = self.collator(rows)
        if ROW in rows[0]:
            batch[ROW] = torch.tensor([row[ROW] for row in rows])
        return batch


class AfterUpdate(TrainerCallback):  # type: ignore[misc]
    """Tells the stepper that the optimizer has moved the weights."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer after each update and before it saves."""
        self.tell()


def refuse_stepping(args: Any) -> None:
    """Errors: ValueError for settings under which a stepper would not see whole rows or true gradients."""
    refused = {
        "packing": args.packing or args.padding_free,
        "shuffle_dataset": args.shuffle_dataset,  # rows are known by their place in the data
        "fp16": args.fp16,
        "more than one process": args.world_size > 1,
        "more than one GPU in one process": args.n_gpu > 1,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(f"a defence that makes its own gradients does not support {setting}")


class DefendedTrainer(SafeTrainer):
    """SafeTrainer with a stepper in place of plain accumulation, and its state in every checkpoint.

    `stepper`: makes the gradients; None leaves SafeTrainer as it is. `safe_data`, `harmful_data`: rows that it draws
    from. `freeze`: called with the model before the optimizer is made. `defence`: what `safeshape.json` says about it.
    Logged: as there, `ce`, `kl` and the weights for the steps in which the trainer's own loss of the user's rows is
    run, and each row once however often a stepper runs it; `num_tokens` counts the user's rows that were run at all.
    Errors: ValueError in one sentence, also when a checkpoint is from another defence or other safe or harmful data.
    """

    _total_train_tokens: int

    def __init__(
        self,
        *arguments: Any,
        stepper: Stepper | None = None,
        safe_data: Dataset | None = None,
        harmful_data: Dataset | None = None,
        freeze: Callable[[nn.Module], None] | None = None,
        defence: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.stepper = stepper
        self._defence = dict(defence or {})
        self._waiting: list[Inputs] = []
        self._streams: dict[str, Stream] = {}
        super().__init__(*arguments, **kwargs)
        if freeze is not None:
            freeze(self.model)
        if stepper is None:
            return
        refuse_stepping(self.args)
        self.data_collator = NumberedRows(self.data_collator)
        for name, data in (("safe", safe_data), ("harmful", harmful_data)):
            if data is not None:
                self._streams[name] = self._stream(data, name)
                self._defence[f"{name}_data"] = data_summary(self._streams[name].rows)["sha256"]
        self.add_callback(AfterUpdate(self._after_update))
        stepper.start(self.model, self._trained())

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def _batch(self) -> int:
        """Rows of a full optimisation batch; a stepper runs in one process only."""
        return int(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)

    def _stream(self, data: Dataset, name: str) -> Stream:
        rows = prepare(
            data,
            self.processing_class,
            needs_signal=False,
            max_length=self.args.max_length,
            overlong=self.overlong,
            name=name,
        )
        return Stream(
            rows=rows,
            collate=self.data_collator,
            batch=self._batch,
            micro_batch=self.args.per_device_train_batch_size,
            seed=self.args.seed,
        )

    # -- row numbers --------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset, *arguments: Any, **kwargs: Any
    ) -> Dataset | IterableDataset:
        prepared = super()._prepare_dataset(dataset, *arguments, **kwargs)
        name = kwargs.get("dataset_name", arguments[-1] if arguments else "")
        if self.stepper is None or name != "train":
            return prepared
        if not isinstance(prepared, Dataset):
            raise ValueError("a defence that makes its own gradients needs a dataset with a length, not a stream")
        return prepared.add_column(ROW, list(range(len(prepared))))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, ROW]

    def _micro_batch(self, inputs: Mapping[str, Any]) -> Any:
        return super()._micro_batch({name: value for name, value in inputs.items() if name != ROW})

    # -- steps --------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Inputs, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Collect the micro-batches; with the last of them the stepper makes the gradient of all."""
        if self.stepper is None:
            plain: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        model.train()
        self._waiting.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, []
        seen: int = self._total_train_tokens
        done: list[bool] = []

        def own() -> torch.Tensor:
            losses = [self._own_step(model, one, num_items_in_batch, again=bool(done)) for one in batches]
            done.append(True)
            count()
            return torch.stack(losses).sum()

        def count() -> None:
            # However often, and under whatever loss, a stepper runs these rows, they were seen once.
            self._total_train_tokens = seen + sum(int(tokens_seen(inputs)) for inputs in batches)

        user = self._pass(model, batches, own=own, count=count)
        return self.stepper.gradients(self._loop(model, user)).detach()

    def _own_step(
        self, model: nn.Module, inputs: Inputs, num_items: torch.Tensor | int | None, *, again: bool
    ) -> torch.Tensor:
        """The trainer's own loss of a micro-batch; a second pass over the same rows is not logged again."""
        without = {name: value for name, value in inputs.items() if name != ROW}
        logged = self._means
        if again:
            self._means = TokenMeans()
        try:
            loss: torch.Tensor = super().training_step(model, without, num_items)
        finally:
            self._means = logged
        return loss

    def _pass(self, model: nn.Module, batches: list[Inputs], **hooks: Callable[[], Any]) -> Pass:
        return Pass(model=model, batches=batches, autocast=self.accelerator.autocast, **hooks)

    def _drawn(self, model: nn.Module, name: str) -> Callable[..., torch.Tensor]:
        if name not in self._streams:
            return _missing(name)
        # Drawn when it is asked for: not every step needs every batch.
        step, drawn = self.state.global_step, list[Pass]()

        def run(*arguments: Any) -> torch.Tensor:
            if not drawn:
                batches = [self._prepare_inputs(inputs) for inputs in self._streams[name].at(step)]
                drawn.append(self._pass(model, batches))
            return drawn[0](*arguments)

        return run

    def _loop(self, model: nn.Module, user: Callable[..., torch.Tensor]) -> Loop:
        return Loop(
            model=model,
            parameters=self._trained(),
            step=self.state.global_step,
            total_steps=self.state.max_steps,
            epoch=float(self.state.epoch or 0.0),
            user=user,
            safe=self._drawn(model, "safe"),
            harmful=self._drawn(model, "harmful"),
            drawn_rows=self._batch,
        )

    def _after_update(self) -> None:
        if self.stepper is not None:
            self.stepper.after(self._loop(self.model, _missing("user")))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What `safeshape.json` says about this run, the defence included."""
        return {**super().record(), "defence": self._defence}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As SafeTrainer; a checkpoint of another defence is refused."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = str(last_complete_checkpoint(Path(self.args.output_dir)) or "") or True
        if isinstance(checkpoint, str) and (Path(checkpoint) / RECORD).is_file():
            then = json.loads((Path(checkpoint) / RECORD).read_text()).get("defence", {})
            if then != self._defence:
                raise ValueError(
                    f"cannot resume {checkpoint}: its defence was {then or 'none'}, now it is {self._defence}"
                )
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {} if self.stepper is None else self.stepper.state()
        if state:
            whole = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
            save_file(whole, Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.stepper is None or not self.stepper.state():
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise ValueError(f"cannot resume {checkpoint}: it holds no {STATE}")
        self.stepper.load({name: value.to(self.args.device) for name, value in load_file(path).items()})


def _missing(name: str) -> Callable[..., torch.Tensor]:
    def run(*arguments: Any) -> torch.Tensor:
        raise ValueError(f"there is no {name} data to draw from")

    return run
