"""SafeTrainer: TRL's SFTTrainer with per-token weights and a frozen reference. It knows no method by name.

Shape suffixes: N response tokens of a micro-batch, H hidden size.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, pack_dataset

from safeshape.caching import Numbered, epochs_of, existing_parent, fill, frozen_head, open_cache, stored_risk
from safeshape.callbacks import GradientFloor, StartAfterSharding
from safeshape.data import ShapedCollator, example_risk, micro_batch, tokens_seen
from safeshape.models import (
    Cached,
    Frozen,
    Reference,
    add_shaped_forward,
    choose_reference,
    make_reference,
    settled_head,
    verify_reference,
)
from safeshape.models.loading import evaluation_mode
from safeshape.models.reference import Reader, States, causal_model, refuse_trained_biases, states_of
from safeshape.onpolicy import OnPolicy, OnPolicyRisk, Smoothed, numbered, refuse_on_policy
from safeshape.policies import Policy, PolicyFunction, resolve_policy
from safeshape.provenance import RECORD, check_resume, checkpoint_of, data_summary, run_record, signals_of
from safeshape.refusals import refuse_arguments, refuse_model, refuse_probe, refuse_unsupported
from safeshape.signals.align import COLUMNS, prepare
from safeshape.signals.online import reader
from safeshape.signals.probes import Probe
from safeshape.steps import Objective, TokenMeans, dense_step, fused_step
from safeshape.types import MicroBatch


class SafeTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer, constructor included, that learns safe tokens and holds risky ones at a frozen reference.

    `policy`: a name, `{"name": ..., parameters}` or a function (see `policies.py`). `reference`: "auto",
    "adapter_off", "copy", "cached" or a model. `probe`: reads the risk of each prompt off the reference's own pass, in
    place of a `safety` column. `on_policy`: judges the model's own answers while it trains (see `onpolicy.py`).
    `gradient_floor`: updates with a smaller gradient norm are skipped. `overlong`: "refuse" or "truncate" for rows
    longer than `max_length`. `loss_head`: "fused" (never full logits), "dense", or "auto": fused where the model's
    output layer can be read. `cache_dir`, `cache_dtype`: where and how exactly "cached" stores the reference's states
    (default: `_reference_states` in the output folder, the model's precision); the folder stays until you delete it.
    `watch`: called with the trainer when it is made, as `SafetyCheck(...).attach` and `InertAlarm().attach` want to be.
    Only answers are learned; an earlier assistant turn is learned when its message carries a `p_safe`. Packing,
    padding-free batches and length grouping work as in TRL.
    Data: `messages`, or `prompt` and `completion`, with a `safety` column where the policy needs one.
    Logged: `ce` and `kl` (unweighted, nats per token, over the tokens with a weight and with a kl weight), `ce_weight`,
    `kl_weight` (means), `batch_risk` (of the last update, with scope="batch"), `judge/*` (see `OnPolicyRisk.logged`),
    `skipped_updates` (share), `risk_hist/*` (share of response tokens), `num_tokens` (all seen, as TRL counts them).
    Errors: ValueError in one sentence for settings that cannot work, naming the row or field for data.
    Source: STAR-DSS, arXiv 2505.17196; adaptive regularisation, arXiv 2602.17546.
    """

    _tag_names: ClassVar = ["trl", "sft", "safeshape"]
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        policy: str | Mapping[str, Any] | PolicyFunction = "star",
        reference: str | nn.Module = "auto",
        probe: Probe | None = None,
        on_policy: OnPolicy | None = None,
        gradient_floor: float = 1e-6,
        overlong: str = "refuse",
        loss_head: str = "auto",
        cache_dir: str | Path | None = None,
        cache_dtype: str = "auto",
        watch: Sequence[Callable[["SafeTrainer"], object]] = (),
        **kwargs: Any,
    ) -> None:
        self.policy: Policy = resolve_policy(policy)
        self.probe, self._on_policy = probe, on_policy
        self.critic: OnPolicyRisk | None = None
        self.overlong, self.loss_head, self._cache_dtype = overlong, loss_head, cache_dtype
        refuse_arguments(overlong, loss_head, cache_dtype, {**kwargs, "data_collator": data_collator})
        refuse_probe(self.policy, probe is not None)
        if args is not None:
            refuse_unsupported(args)
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("the train dataset is empty")
        self._signals = [] if train_dataset is None else signals_of(train_dataset)
        self._data: dict[str, Any] = {}
        self._numbered = Numbered()
        self.notes: Callable[[], dict[str, Any]] = dict  # what whoever runs this trainer adds to its record
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._set_up(reference, gradient_floor, Path(cache_dir or Path(self.args.output_dir) / "_reference_states"))
        for attach in watch:
            attach(self)

    def _set_up(self, reference: str | nn.Module, gradient_floor: float, cache_dir: Path) -> None:
        self._numbered.accepting = False
        refuse_model(self.model, self.aux_loss_enabled, self.accelerator.parallelism_config)
        if self._sharded and self.critic is not None:
            raise ValueError("on-policy judging generates answers and needs whole weights in every process; use ddp")
        self.data_collator: Any = ShapedCollator(vars(self)["data_collator"])
        # The loss is divided by N here, so the trainer must count N for every model class.
        self.model_accepts_loss_kwargs = True
        add_shaped_forward(causal_model(self.model))
        self._cache_dir = cache_dir
        self.reference: Reference | None = None
        self.reference_kind = self._choose(reference) if self.policy.needs_reference else None
        self._reader = None if self.probe is None else self._read_with(self.probe)
        self.floor = GradientFloor(gradient_floor)
        self.add_callback(self.floor)
        self.add_callback(StartAfterSharding(self._start))
        self._started = False
        self._batch_risk = 0.0
        self.smoothed = Smoothed(ema=float(self.policy.parameters.get("ema", 0.0)))
        self._means = TokenMeans()

    # -- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError("SafeTrainer trains on text; give a tokenizer as processing_class, not a processor")
        columns, train = set(dataset.column_names or []), dataset_name == "train"
        if self._on_policy is not None and train:
            refuse_on_policy(self.policy, dataset, probe=self.probe is not None, prepared=set(COLUMNS) <= columns)
            self.critic = OnPolicyRisk(self._on_policy, dataset, processing_class, scored="safety" in columns)
        scores_come = self.probe is not None or (self.critic is not None and not self.critic.scored)
        if not set(COLUMNS) <= columns:
            dataset = prepare(
                dataset,
                processing_class,
                needs_signal=self.policy.needs_signal and not scores_come,
                max_length=args.max_length,
                overlong=self.overlong,
                name=dataset_name,
            )
        if not self._data:
            self._data = data_summary(dataset)
        if self.policy.needs_reference and self._numbered.accepting and "cache_index" not in columns:
            dataset = self._numbered.add(dataset)
        if self.critic is not None and train:
            dataset = numbered(dataset)
        if packing and "seq_lengths" not in columns:
            options = {"desc": f"Packing {dataset_name} data"} if isinstance(dataset, Dataset) else {}
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        # Otherwise the trainer drops the weights before the collator sees them.
        self._signature_columns = [*COLUMNS, "cache_index", "row_index", "seq_lengths"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Collect the micro-batches of one update; the mean risk is over all of them and all ranks."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and self.critic is not None and self.reference is not None:
            with self.accelerator.autocast():
                self.critic.update(self.state.global_step, samples, self.model, self.reference)
        if samples and (self._reader is None or isinstance(self.reference, Cached)):
            risk_B = torch.cat([self._risk(sample) for sample in samples]).to(device)
            total = self.accelerator.reduce(torch.stack([risk_B.sum(), risk_B.new_tensor(float(len(risk_B)))]))
            self._batch_risk = self.smoothed.next(float(total[0] / total[1]), self.critic)
        return samples, num_items

    def _read_with(self, probe: Probe) -> Reader:
        probe.check_fits(causal_model(self.model))
        if self.policy.parameters.get("scope") == "batch" and self.reference_kind != "cached":
            raise ValueError("a risk of the whole batch must be known before its forward; use reference='cached'")
        self._signals = [{"signal": "probe", "scorer": probe.identity(), "rows": self._data["rows"]}]
        return reader(probe)

    def _risk(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Risk of each example before any forward: from the data, or where the probe read it, from the store."""
        if self._reader is not None and isinstance(self.reference, Cached) and "cache_index" in inputs:
            return stored_risk(self.reference.cache, inputs)
        return example_risk(inputs)

    # -- reference ------------------------------------------------------------------------------------------------

    def _choose(self, spec: str | nn.Module) -> str:
        """Settle what `reference` means; live references are built here, stored states when training starts."""
        base = causal_model(self.model)
        size = torch.float32.itemsize if self._cache_dtype == "float32" else base.dtype.itemsize
        states = sum(self._numbered.tokens_per_row) * int(base.config.get_text_config().hidden_size) * size
        chosen = choose_reference(
            # States alone cannot answer: a full model that is judged on its answers wants the starting one beside it.
            "copy" if spec == "auto" and self.critic is not None and not isinstance(self.model, PeftModel) else spec,
            self.model,
            epochs=epochs_of(self.args, len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else 0),
            cache_bytes=None if self._numbered.streams else states,
            free_bytes=shutil.disk_usage(existing_parent(self._cache_dir)).free,
        )
        if chosen == "cached":
            if isinstance(self.model, PeftModel):
                refuse_trained_biases(self.model)
            return chosen
        self.reference = make_reference(chosen, self.model)
        if isinstance(self.reference, Frozen):
            self.reference.model.to(self.args.device)
        return self.reference.kind

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _open_store(self) -> None:
        """Find or begin the store of the reference's states, from weights that are still whole."""
        if self.reference_kind != "cached" or self.reference is not None:
            return
        cache = open_cache(
            self._cache_dir,
            self.model,
            numbered=self._numbered,
            read="" if self.probe is None else self.probe.fingerprint(),
            dtype=self._cache_dtype,
            accelerator=self.accelerator,
        )
        self.reference = Cached(cache=cache, frozen_head=frozen_head(cache, self.model, self.args.device))

    def _start(self) -> None:
        """Once, before the first step: fill the store, look at the head, verify the reference."""
        started, self._started = self._started, True
        if not started:
            with self.accelerator.autocast():  # which the trainer wraps around the model only later
                self._make_ready(self.model_wrapped if self._sharded else self.model)

    def _make_ready(self, model: nn.Module) -> None:
        resumed = self._sharded and self.state.global_step > 0
        if isinstance(self.reference, Cached):
            if resumed and self.reference.cache.missing() and self.reference.frozen_head is not None:
                raise ValueError(f"cannot resume: the reference's states are not in {self.reference.cache.folder}")
            self._fill(self.reference, model)
        rows = [row for row, _ in zip(self.train_dataset, range(2), strict=False)]
        batch = self._micro_batch(self.data_collator(rows))
        self.loss_head = settled_head(self.loss_head, model, batch)
        if self.reference is not None and not resumed:
            movable, size = not self.is_deepspeed_enabled, len(self.processing_class)
            verify_reference(self.reference, model, batch, self.model, size, disturb=movable)
        if self.critic is not None and self.reference is not None:
            self.critic.start(self.model, self.reference, self.accelerator)

    def _fill(self, reference: Cached, model: nn.Module) -> None:
        def read(batch: MicroBatch) -> States:
            if reference.frozen_head is None:
                return reference.live.states(model, self.model, batch, self._reader)
            with torch.no_grad(), evaluation_mode(model):
                return states_of(model, batch, self._reader)

        datasets = self._numbered.datasets
        collate = lambda rows: self._micro_batch(self.data_collator(rows))  # noqa: E731
        fill(reference.cache, datasets, collate=collate, read=read, accelerator=self.accelerator)

    def remove_stored_states(self) -> None:
        """Delete what `cached` wrote; afterwards this trainer cannot train or evaluate with it."""
        self.accelerator.wait_for_everyone()
        if isinstance(self.reference, Cached) and self.accelerator.is_main_process:
            self.reference.cache.remove()

    def _micro_batch(self, inputs: Mapping[str, Any]) -> MicroBatch:
        return micro_batch(self._prepare_inputs(dict(inputs)))

    # -- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The shaped loss of one micro-batch, divided by the response tokens of the whole optimisation batch."""
        batch = micro_batch(inputs)
        objective = Objective(
            policy=self.policy,
            reference=self.reference,
            batch_risk=self._batch_risk,
            num_tokens=batch.counted_BT.sum() if num_items_in_batch is None else num_items_in_batch,
            reader=self._reader,
        )
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        step_of = dense_step if self.loss_head == "dense" else fused_step
        with self.accelerator.autocast():
            step = step_of(model, unwrapped, batch, objective)
        self._means.add("train" if self.model.training else "eval", step)
        if self.model.training:
            self._total_train_tokens += int(self.accelerator.reduce(tokens_seen(inputs)))
        loss = step.out.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # N counts the tokens of every rank, while data parallelism averages the gradients over ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**batch.forward, use_cache=False)

    def evaluate(self, *arguments: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL; before training, the reference is made ready first."""
        self._open_store()
        if not self._sharded:
            self._start()
        return dict(super().evaluate(*arguments, **kwargs))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """One evaluation batch; in batch scope its own mean risk stands for the optimisation batch."""
        if self.critic is not None:
            self.critic.write(inputs)
        risk = float(self._risk(inputs).mean())
        self._batch_risk = risk if self.critic is None else self.critic.batch_risk(risk)
        return super().prediction_step(model, inputs, *arguments, **options)

    # -- logs -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token-weighted means since the last log."""
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        logs |= {prefix + name: value for name, value in self._means.take(mode, self.accelerator.reduce).items()}
        if mode == "train":
            logs["skipped_updates"] = self.floor.skipped / max(self.floor.updates, 1)
            logs["num_tokens"] = self._total_train_tokens
            if self.policy.parameters.get("scope") == "batch":
                logs["batch_risk"] = self._batch_risk
            if self.critic is not None:
                logs |= self.critic.logged()
        self._metrics[mode] = defaultdict(list)
        super().log(logs, start_time)

    # -- start, resume, save ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Verify the reference, refuse to resume on other data or another policy, then train."""
        checkpoint = checkpoint_of(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            state = check_resume(Path(checkpoint), self.record())
            self.smoothed.value = state["risk_ema"]
            self.floor.updates, self.floor.skipped = state["updates"], state["skipped"]
            if self.critic is not None:
                self.critic.load(state["on_policy"])
        self._open_store()
        if not self._sharded:
            self._start()
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            if self.critic is not None:
                self.critic.stop()

    def record(self) -> dict[str, Any]:
        """What `safeshape.json` says about this run."""
        counts = {"updates": self.floor.updates, "skipped": self.floor.skipped}
        critic = {} if self.critic is None else {"on_policy": self.critic.state()}
        return {"loss_head": self.loss_head, "critic": self.notes()} | run_record(
            policy=self.policy,
            reference=self.reference_kind,
            signals=self._signals,
            data=self._data,
            model=self.model,
            on_policy=None if self._on_policy is None else self._on_policy.identity(),
            state={"risk_ema": self.smoothed.value, **counts, **critic},
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        path = Path(output_dir or self.args.output_dir) / RECORD
        path.write_text(json.dumps(self.record(), indent=2) + "\n")
