"""SafeTrainer: TRL's SFTTrainer with per-token weights and a frozen reference. It knows no method by name.

Shape suffixes: B rows, L tokens of the padded batch, T = L - 1 predicted tokens, V vocabulary.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from safeshape.data import ShapedCollator, example_risk, response_position
from safeshape.losses import label_logp, log_softmax, shaped_loss
from safeshape.models import Frozen, make_reference, verify_reference
from safeshape.policies import Batch, Policy, PolicyFunction, resolve_policy
from safeshape.provenance import RECORD, check_resume, data_summary, last_complete_checkpoint, run_record, signals_of
from safeshape.signals.align import COLUMNS, prepare
from safeshape.types import IGNORE, LossOutput, Weights

RISK_BINS = 5


class GradientFloor(TrainerCallback):  # type: ignore[misc]
    """Skips updates whose gradient is rounding noise.

    At theta = theta_0 every KL gradient is zero; on a batch with nothing to learn only noise (norm about 1e-8) is left,
    and AdamW would rescale it to a full step. Below the floor all gradients are removed, so the optimizer does nothing.
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self.updates = 0
        self.skipped = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer after clipping and before the optimizer."""
        model: nn.Module = kwargs["model"]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.updates += 1
        if float(torch.nn.utils.get_total_norm(gradients)) < self.floor:
            self.skipped += 1
            model.zero_grad(set_to_none=True)


class SafeTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer, constructor included, that learns safe tokens and holds risky ones at a frozen reference.

    `policy`: a name, `{"name": ..., parameters}` or a function (see `policies.py`). `reference`: "auto",
    "adapter_off", "copy" or a model. `gradient_floor`: updates with a smaller gradient norm are skipped. `overlong`:
    "refuse" or "truncate" for rows longer than `max_length`. Only answers are learned; an earlier assistant turn is
    learned when its message carries a `p_safe`.
    Data: `messages`, or `prompt` and `completion`, with a `safety` column where the policy needs one.
    Logged: `ce`, `kl` (unweighted, nats per response token), `ce_weight`, `kl_weight` (means), `skipped_updates`
    (share), `risk_hist/*` (share of response tokens), `num_tokens` (all tokens seen, as TRL counts them).
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
        gradient_floor: float = 1e-6,
        overlong: str = "refuse",
        **kwargs: Any,
    ) -> None:
        self.policy: Policy = resolve_policy(policy)
        self.overlong = overlong
        if overlong not in ("refuse", "truncate"):
            raise ValueError(f"overlong must be refuse or truncate, got {overlong!r}")
        if data_collator is not None:
            raise ValueError("SafeTrainer brings its own data_collator: the weights travel in it")
        for name in ("compute_loss_func", "formatting_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"SafeTrainer does not support {name}; write a policy, or render the data beforehand")
        if args is not None:
            refuse_unsupported(args)
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("the train dataset is empty")
        self._signals = [] if train_dataset is None else signals_of(train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.aux_loss_enabled:
            raise ValueError("mixture-of-experts auxiliary losses are not supported; set router_aux_loss_coef to 0")
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt-learning adapters put virtual tokens before the labels; use LoRA")
        self.data_collator: Any = ShapedCollator(vars(self)["data_collator"])
        # The loss is divided by N here, so the trainer must count N for every model class.
        self.model_accepts_loss_kwargs = True
        self.reference = make_reference(reference, self.model) if self.policy.needs_reference else None
        if isinstance(self.reference, Frozen):
            self.reference.model.to(self.args.device)
        self.floor = GradientFloor(gradient_floor)
        self.add_callback(self.floor)
        self._data = data_summary(self.train_dataset)
        self._batch_risk = 0.0
        self._risk_ema: float | None = None
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}

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
        columns = dataset.column_names or []
        if not set(COLUMNS) <= set(columns):
            dataset = prepare(
                dataset,
                processing_class,
                needs_signal=self.policy.needs_signal,
                max_length=args.max_length,
                overlong=self.overlong,
                name=dataset_name,
            )
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        # Otherwise the trainer drops the weights before the collator sees them.
        self._signature_columns = list(COLUMNS)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Collect the micro-batches of one update; the mean risk is over all of them and all ranks."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            risk_B = torch.cat([example_risk(s["labels"], s["answer_p_safe"]) for s in samples]).to(device)
            total = self.accelerator.reduce(torch.stack([risk_B.sum(), risk_B.new_tensor(float(len(risk_B)))]))
            risk, ema = float(total[0] / total[1]), float(self.policy.parameters.get("ema", 0.0))
            # The first batch starts the average: the paper gives no initial value.
            self._risk_ema = risk if self._risk_ema is None else ema * self._risk_ema + (1 - ema) * risk
            self._batch_risk = self._risk_ema if ema else risk
        return samples, num_items

    # -- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The shaped loss of one micro-batch, divided by the response tokens of the whole optimisation batch."""
        labels_BT, p_safe_BT = inputs["labels"][:, 1:], inputs["p_safe"][:, 1:]
        forward = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        outputs = model(**forward, use_cache=False)
        logits_BTV = outputs.logits[:, :-1]
        ref_logits_BTV = None
        if self.reference is not None:
            unwrapped = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():
                ref_logits_BTV = self.reference.logits(model, unwrapped, forward)[:, :-1]
        weights = self._weights(logits_BTV, ref_logits_BTV, labels_BT, p_safe_BT, inputs["answer_p_safe"][:, 1:])
        counted_BT = labels_BT != IGNORE
        out = shaped_loss(
            logits_BTV,
            ref_logits_BTV,
            labels_BT,
            weights,
            divergence=self.policy.divergence,
            num_tokens=counted_BT.sum() if num_items_in_batch is None else num_items_in_batch,
        )
        self._record(out, weights, counted_BT, p_safe_BT)
        if self.model.training:
            self._total_train_tokens += int(self.accelerator.reduce(inputs["attention_mask"].sum()))
        loss = out.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # N counts the tokens of every rank, while data parallelism averages the gradients over ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _weights(
        self,
        logits_BTV: torch.Tensor,
        ref_logits_BTV: torch.Tensor | None,
        labels_BT: torch.Tensor,
        p_safe_BT: torch.Tensor,
        answer_p_safe_BT: torch.Tensor,
    ) -> Weights:
        log_ratio_BT = torch.zeros_like(p_safe_BT)
        if self.policy.needs_log_ratio and ref_logits_BTV is not None:
            counted_BT = labels_BT != IGNORE
            labels_M = labels_BT[counted_BT]
            logp_M = label_logp(log_softmax(logits_BTV.detach()[counted_BT]), labels_M)
            ref_logp_M = label_logp(log_softmax(ref_logits_BTV[counted_BT]), labels_M)
            log_ratio_BT[counted_BT] = (logp_M - ref_logp_M).to(log_ratio_BT)
        batch = Batch(
            answer_p_safe_BT=answer_p_safe_BT,
            position_BT=response_position(labels_BT),
            log_ratio_BT=log_ratio_BT,
            batch_risk=self._batch_risk,
        )
        weights = self.policy(p_safe_BT, batch)
        for name, weight_BT in (("ce", weights.ce_BT), ("kl", weights.kl_BT)):
            if not bool(torch.isfinite(weight_BT).all()):
                raise ValueError(f"policy {self.policy.name!r} gave a {name} weight that is not a finite number")
        return weights

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, Any, Any]:
        """One evaluation batch; in batch scope its own mean risk stands for the optimisation batch."""
        self._batch_risk = float(example_risk(inputs["labels"], inputs["answer_p_safe"]).mean())
        step: tuple[torch.Tensor, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return step

    # -- logs -----------------------------------------------------------------------------------------------------

    def _record(self, out: LossOutput, weights: Weights, counted_BT: torch.Tensor, p_safe_BT: torch.Tensor) -> None:
        count = counted_BT.sum()
        bins_M = ((1 - p_safe_BT[counted_BT]) * RISK_BINS).long().clamp(max=RISK_BINS - 1)
        sums = {
            "tokens": count.float(),
            "ce": out.metrics["ce"] * count,
            "kl": out.metrics["kl"] * count,
            "ce_weight": weights.ce_BT[counted_BT].sum(),
            "kl_weight": weights.kl_BT[counted_BT].sum(),
        }
        sums |= {f"risk_hist/{b / RISK_BINS:.1f}": (bins_M == b).sum().float() for b in range(RISK_BINS)}
        mode = "train" if self.model.training else "eval"
        for name, value in sums.items():
            self._sums[mode][name] = self._sums[mode].get(name, 0.0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token-weighted means since the last log."""
        mode = "train" if self.model.training else "eval"
        sums = {name: float(self.accelerator.reduce(value)) for name, value in self._sums[mode].items()}
        tokens = max(sums.pop("tokens", 0.0), 1.0)
        prefix = "eval_" if mode == "eval" else ""
        logs.update({prefix + name: value / tokens for name, value in sums.items()})
        if mode == "train":
            logs["skipped_updates"] = self.floor.skipped / max(self.floor.updates, 1)
            logs["num_tokens"] = self._total_train_tokens
        self._sums[mode] = {}
        self._metrics[mode] = defaultdict(list)
        super().log(logs, start_time)

    # -- start, resume, save ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Verify the reference, refuse to resume on other data or another policy, then train."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = str(last_complete_checkpoint(Path(self.args.output_dir)) or "")
            if not checkpoint:
                raise ValueError(f"no complete checkpoint to resume from in {self.args.output_dir}")
        if isinstance(checkpoint, str):
            state = check_resume(Path(checkpoint), self.record())
            self._risk_ema = state["risk_ema"]
            self.floor.updates, self.floor.skipped = state["updates"], state["skipped"]
        if self.reference is not None and self.state.global_step == 0:
            self._verify_reference()
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _verify_reference(self) -> None:
        if self.reference is None:
            return
        rows = [row for row, _ in zip(self.train_dataset, range(2), strict=False)]
        batch = self._prepare_inputs(self.data_collator(rows))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        verify_reference(self.reference, self.model, inputs)

    def record(self) -> dict[str, Any]:
        """What `safeshape.json` says about this run."""
        return run_record(
            policy=self.policy,
            reference=None if self.reference is None else self.reference.kind,
            signals=self._signals,
            data=self._data,
            model=self.model,
            state={"risk_ema": self._risk_ema, "updates": self.floor.updates, "skipped": self.floor.skipped},
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        path = Path(output_dir or self.args.output_dir) / RECORD
        path.write_text(json.dumps(self.record(), indent=2) + "\n")


def refuse_unsupported(args: SFTConfig) -> None:
    """Errors: ValueError that names the first setting SafeTrainer cannot honour."""
    refused = {
        "packing=True": args.packing,
        "padding_free=True": args.padding_free,
        f"loss_type={args.loss_type!r}": args.loss_type != "nll",
        f"label_smoothing_factor={args.label_smoothing_factor}": args.label_smoothing_factor > 0,
        "completion_only_loss=False": args.completion_only_loss is False,
        "activation_offloading=True": args.activation_offloading,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(f"SafeTrainer does not support {setting}")
