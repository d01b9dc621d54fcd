"""Products with a head: float32 (or wider) out, whatever goes in, one part of the vocabulary at a time where cast.

Shape suffixes: R rows (tokens) of a chunk, H hidden size, V rows of the head, C rows of it that are cast at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CAST_ROWS = 4096  # rows of a head that are cast at a time


@dataclass(frozen=True, kw_only=True)
class Head:
    """`logits = softcap * tanh((hidden @ weight.T + bias) * scale / softcap)`, without the tanh if softcap is None."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    softcap: float | None


def logits_dtype(hidden: torch.Tensor, head: torch.Tensor) -> torch.dtype:
    """The type that logits and sums are computed in: float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)


def factor_dtype(hidden: torch.Tensor, head: torch.Tensor, out: torch.dtype) -> torch.dtype:
    """The type of the factors of a product whose result has type `out`.

    CUDA multiplies half-precision factors as they are, under autocast those cast to its type, and gives the float32
    sums. A bfloat16 product elsewhere would round its result, so there the factors are cast up.
    """
    device = hidden.device.type
    if device != "cuda":
        return out
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    if torch.is_autocast_enabled(device) and out == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    return dtype if dtype.itemsize == 2 else out


def cast_parts(weight_VH: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The whole head where it has the type already, else one cast part of it after the other."""
    step = max(len(weight_VH), 1) if weight_VH.dtype == dtype else CAST_ROWS
    for start in range(0, len(weight_VH), step):
        part = slice(start, start + step)
        yield part, weight_VH[part].to(dtype)


def project_(out_RV: torch.Tensor, hidden_RH: torch.Tensor, head: Head, factor: torch.dtype) -> None:
    """Logits before the softcap into `out_RV`."""
    hidden_RH = hidden_RH.to(factor)
    for part, weight_CH in cast_parts(head.weight_VH, factor):
        out_RC = out_RV[:, part]
        if factor != out_RV.dtype:
            torch.mm(hidden_RH, weight_CH.t(), out_dtype=out_RV.dtype, out=out_RC)
            if head.scale != 1.0:
                out_RC.mul_(head.scale)
        else:
            torch.addmm(out_RC, hidden_RH, weight_CH.t(), beta=0, alpha=head.scale, out=out_RC)
    if head.bias_V is not None:
        out_RV.add_(head.bias_V.to(out_RV.dtype), alpha=head.scale)


def add_product_(sum_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """`sum_ += scale * left @ right`, added up in the type of `sum_`."""
    if right.dtype != sum_.dtype:
        torch.addmm(sum_, left.to(right.dtype), right, alpha=scale, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_.addmm_(left, right, alpha=scale)


def gradient_factor_dtype(factor: torch.dtype) -> torch.dtype:
    """float16 cannot hold the gradient of one logit out of a hundred thousand; bfloat16 has float32's range."""
    return torch.float32 if factor == torch.float16 else factor
