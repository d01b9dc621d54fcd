"""Time and memory of the loss head alone (CE + KL, forward and backward), side by side in one run.

    python bench/head.py                                    # this CPU, float32, a tiny model at real vocabulary sizes
    python bench/head.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 4096 --vocab 131072

Every token has both weights, so that nobody gains by skipping. Repetitions are interleaved and their median is shown.
Memory is the extra peak of one forward and backward, measured in a process of its own (peak resident set on a CPU,
the allocator's peak on a GPU), as a share of one model's dense float32 logits. A trainable head's own gradient, which
every method must hold, is not counted.

`safeshape`: `fused_shaped_loss`. `products`: its matrix products alone, in the same chunks. `dense`: both models'
full logits and `shaped_loss`. `trl`: TRL's `ChunkedLogProbFunction` and `ChunkedDivergenceFunction`. `liger`: Liger's
fused JSD at beta 1 (reverse) or 0 (forward) with its cross-entropy (`liger_kernel.chunked_loss`), where installed,
compiled as it is by default and not compiled.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safeshape.kernels import fused_shaped_loss
from safeshape.kernels.chunked import chunk_rows
from safeshape.losses import shaped_loss
from safeshape.types import Weights

Setting = dict[str, Any]
TRL_VOCAB_CHUNK = 8192  # what TRL's trainers pass


class Inputs:
    """Random hidden states, one head for both models (LoRA) or two, labels and weights."""

    def __init__(self, setting: Setting) -> None:
        g = torch.Generator().manual_seed(0)
        n, h, v = setting["tokens"], setting["hidden"], setting["vocab"]
        kind = {"device": setting["device"], "dtype": getattr(torch, setting["dtype"])}
        self.hidden = torch.randn(n, h, generator=g).to(**kind).requires_grad_()
        self.ref_hidden = (self.hidden.detach().float() + 0.1 * torch.randn(n, h, generator=g).to(kind["device"])).to(
            **kind
        )
        self.head = torch.empty(v, h).normal_(std=h**-0.5, generator=g).to(**kind)
        self.ref_head = self.head
        if setting["head"] == "trainable":
            self.ref_head = self.head.clone()
            self.head.requires_grad_()
        self.labels = torch.randint(0, v, (n,), generator=g).to(kind["device"])
        p_safe = torch.rand(n, generator=g).to(kind["device"])
        self.weights = Weights(ce_BT=p_safe, kl_BT=0.5 * (1 - p_safe))

    def finish(self, loss: torch.Tensor) -> float:
        """Run the backward pass, drop the gradients, and give the loss."""
        loss.backward()
        self.hidden.grad = self.head.grad = None
        return float(loss.detach())


def run_safeshape(x: Inputs, setting: Setting) -> torch.Tensor:
    return fused_shaped_loss(
        x.hidden,
        x.head,
        x.ref_hidden,
        x.ref_head,
        x.labels,
        x.weights,
        divergence=setting["divergence"],
        num_tokens=len(x.labels),
        implementation=setting["implementation"],
    ).loss


def run_products(x: Inputs, setting: Setting) -> torch.Tensor:
    with torch.no_grad():
        wide = torch.float32 if x.hidden.device.type == "cpu" else x.hidden.dtype
        rows = chunk_rows(len(x.labels), 2 * len(x.head), torch.float32, x.head.device, None)
        head = x.head.to(wide)
        grad_head = torch.zeros_like(x.head) if x.head.requires_grad else None
        buffer = torch.empty(2 * rows, len(head), dtype=wide, device=head.device)
        grad = torch.empty_like(x.hidden, dtype=wide)
        for start in range(0, len(x.labels), rows):
            part = slice(start, start + rows)
            a, b = x.hidden[part].to(wide), x.ref_hidden[part].to(wide)
            if x.head is x.ref_head:
                torch.mm(torch.cat([a, b]), head.t(), out=buffer[: 2 * len(a)])
            else:
                torch.mm(a, head.t(), out=buffer[: len(a)])
                torch.mm(b, x.ref_head.to(wide).t(), out=buffer[len(a) : 2 * len(a)])
            torch.mm(buffer[: len(a)], head, out=grad[part])
            if grad_head is not None:
                grad_head.addmm_(buffer[: len(a)].t().to(grad_head.dtype), x.hidden[part])
    return (x.hidden * 0).sum()


def run_dense(x: Inputs, setting: Setting) -> torch.Tensor:
    logits = x.hidden @ x.head.t()
    with torch.no_grad():
        ref_logits = x.ref_hidden @ x.ref_head.t()
    weights = Weights(ce_BT=x.weights.ce_BT[None], kl_BT=x.weights.kl_BT[None])
    return shaped_loss(
        logits[None],
        ref_logits[None],
        x.labels[None],
        weights,
        divergence=setting["divergence"],
        num_tokens=len(x.labels),
    ).loss


def run_trl(x: Inputs, setting: Setting) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = 1.0 if setting["divergence"] == "reverse" else 0.0
    logp = ChunkedLogProbFunction.apply(x.hidden, x.head, None, x.labels, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ())[0]
    divergence = ChunkedDivergenceFunction.apply(x.hidden, x.head, None, x.ref_hidden, x.ref_head, None, beta)[0]
    return (x.weights.kl_BT * divergence - x.weights.ce_BT * logp).sum() / len(x.labels)


def run_liger(x: Inputs, setting: Setting, compiled: bool) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = 1.0 if setting["divergence"] == "reverse" else 0.0
    key = (beta, compiled)
    if key not in _LIGER:
        _LIGER[key] = LigerFusedLinearJSDLoss(beta=beta, compiled=compiled)
    return _LIGER[key](x.hidden, x.head, x.ref_hidden, x.ref_head, x.labels)


_LIGER: dict[tuple[float, bool], Any] = {}
METHODS: dict[str, Callable[[Inputs, Setting], torch.Tensor]] = {
    "safeshape": run_safeshape,
    "products": run_products,
    "dense": run_dense,
    "trl": run_trl,
}
if importlib.util.find_spec("liger_kernel"):
    METHODS["liger"] = lambda x, setting: run_liger(x, setting, True)
    METHODS["liger, not compiled"] = lambda x, setting: run_liger(x, setting, False)


def synchronize(setting: Setting) -> None:
    if setting["device"] != "cpu":
        torch.cuda.synchronize()


def times(setting: Setting, methods: list[str]) -> dict[str, float]:
    """Median seconds of each method, repetitions interleaved, after one warm-up."""
    x = Inputs(setting)
    clock = time.process_time if setting["clock"] == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for repetition in range(setting["repeats"] + 1):
        for name in methods:
            synchronize(setting)
            start = clock()
            x.finish(METHODS[name](x, setting))
            synchronize(setting)
            if repetition:
                taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def resident(field: str) -> int:
    """Bytes that Linux reports for this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(setting: Setting, name: str) -> int:
    """Extra bytes at the peak of one forward and backward, the head's own gradient not counted."""
    torch.set_num_threads(setting["threads"])
    x = Inputs(setting)
    small = Inputs({**setting, "vocab": 512, "tokens": 16})
    small.finish(METHODS[name](small, setting))
    if setting["device"] == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        x.finish(METHODS[name](x, setting))
        extra = resident("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x.finish(METHODS[name](x, setting))
        extra = torch.cuda.max_memory_allocated() - before
    return extra - (x.head.numel() * x.head.element_size() if x.head.requires_grad else 0)


def measure(setting: Setting, methods: list[str], memory: bool) -> list[dict[str, Any]]:
    rows = [{**setting, "method": name, "seconds": s} for name, s in times(setting, methods).items()]
    dense_bytes = setting["tokens"] * setting["vocab"] * 4
    ours = rows[0]["seconds"]
    for row in rows:
        row["ours_over_this"] = ours / row["seconds"]
        if memory:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row["peak_bytes"] = pool.apply(peak, (setting, row["method"]))
            row["peak_over_dense_logits"] = row["peak_bytes"] / dense_bytes
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\nV {first['vocab']}, head {first['head']}, {first['divergence']}, N {first['tokens']}, H {first['hidden']}"
    )
    print(f"{'method':22}{'ms':>10}{'safeshape / this':>18}{'peak MB':>10}{'peak / dense logits':>21}")
    for row in rows:
        memory = f"{row['peak_bytes'] / 1e6:10.0f}{row['peak_over_dense_logits']:21.3f}" if "peak_bytes" in row else ""
        print(f"{row['method']:22}{row['seconds'] * 1e3:10.1f}{row['ours_over_this']:18.3f}{memory}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--head", nargs="+", default=["frozen", "trainable"], choices=["frozen", "trainable"])
    parser.add_argument("--divergence", nargs="+", default=["reverse"], choices=["reverse", "forward"])
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a machine that others load")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    methods = ["safeshape", *(name for name in args.methods if name != "safeshape")]
    print(f"torch {torch.__version__}, {platform.machine()}, {args.device}, {args.dtype}, {args.threads} threads")
    rows = []
    for vocab in args.vocab:
        for head in args.head:
            for divergence in args.divergence:
                setting = {"vocab": vocab, "head": head, "divergence": divergence}
                setting |= {
                    name: value
                    for name, value in vars(args).items()
                    if name in ("device", "dtype", "tokens", "hidden", "implementation", "repeats", "threads", "clock")
                }
                rows.append(measure(setting, methods, not args.no_memory))
                show(rows[-1])
    if args.output:
        args.output.write_text(json.dumps([row for part in rows for row in part], indent=2) + "\n")


if __name__ == "__main__":
    main()
