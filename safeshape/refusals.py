"""What SafeTrainer cannot honour is refused by name, before anything is computed."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from trl import SFTConfig

from safeshape.models.states import DTYPES
from safeshape.policies import Policy

LOSS_HEADS = ("auto", "fused", "dense")


def refuse_arguments(overlong: str, loss_head: str, cache_dtype: str, others: Mapping[str, Any]) -> None:
    """Errors: ValueError that names the first argument SafeTrainer does not take."""
    if overlong not in ("refuse", "truncate"):
        raise ValueError(f"overlong must be refuse or truncate, got {overlong!r}")
    if loss_head not in LOSS_HEADS:
        raise ValueError(f"loss_head must be one of {', '.join(LOSS_HEADS)}, got {loss_head!r}")
    if cache_dtype not in ("auto", *DTYPES):
        raise ValueError(f"cache_dtype must be one of auto, {', '.join(DTYPES)}, got {cache_dtype!r}")
    if others.get("data_collator") is not None:
        raise ValueError("SafeTrainer brings its own data_collator: the weights travel in it")
    for name in ("compute_loss_func", "formatting_func"):
        if others.get(name) is not None:
            raise ValueError(f"SafeTrainer does not support {name}; write a policy, or render the data beforehand")


def refuse_probe(policy: Policy, probe: bool) -> None:
    """Errors: ValueError for a probe beside a policy without the reference pass that it reads."""
    if probe and not policy.needs_reference:
        raise ValueError(f"a probe reads the reference's hidden states, which policy {policy.name!r} does not need")


def refuse_unsupported(args: SFTConfig) -> None:
    """Errors: ValueError that names the first setting SafeTrainer cannot honour."""
    refused = {
        f"loss_type={args.loss_type!r}": args.loss_type != "nll",
        f"label_smoothing_factor={args.label_smoothing_factor}": args.label_smoothing_factor > 0,
        "completion_only_loss=False": args.completion_only_loss is False,
        "activation_offloading=True": args.activation_offloading,
        # Its layer kernels need a GPU, where nobody has compared them with the plain layers under this trainer yet.
        "use_liger_kernel=True": args.use_liger_kernel,
        # It cuts rows anywhere and lets tokens attend to the row before.
        "packing_strategy='wrapped'": args.packing and args.packing_strategy == "wrapped",
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(f"SafeTrainer does not support {setting}")


def refuse_model(model: nn.Module, aux_loss: bool, parallelism: Any) -> None:
    """Errors: ValueError for models and layouts whose tokens or losses SafeTrainer would not see whole.

    `parallelism`: accelerate's `ParallelismConfig`, or None.
    """
    if aux_loss:
        raise ValueError("mixture-of-experts auxiliary losses are not supported; set router_aux_loss_coef to 0")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("prompt-learning adapters put virtual tokens before the labels; use LoRA")
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "context and sequence parallelism do not share out the token weights; set cp_size and sp_size to 1"
        )
