"""STAR scoring against one forward per partial answer, on the same random guard in one run.

    python bench/star.py --lengths 64 256 1024 --output star.json
    python bench/star.py --device cuda --dtype bfloat16 --shape llama-8b --lengths 512

Naive: every partial answer in a forward of its own, batched by length and padded on the right (which needs no mask, as
attention is causal), with only the label rows of the head; the batch size is the fastest of several. Ours: one prefill
of the full answer and one short segment per partial answer. Both start from token ids; the header is random and not
shared between answers. Times are CPU time of the process (CUDA: wall time), so other programs matter little.

The bound is the ratio of the operations that both ways need at least, counted from the shapes: linear layers for every
token, attention for every pair of a token and one it sees.

`refine`: the world's guard scores long answers put together from the embedded world's, and the branches it asks for,
round by round, are run on the random guard: so its time counts the same branches on the larger model. The answers form
one run: they have one header, and their rounds share forwards. The world's guard was trained on answers of up to about
60 tokens. "one turn": the world's answers that turn to a plan and back once, with longer talk before and after it.
"turns": skills and look-alikes with a plan in every 256 tokens. "pasted": the world's user data one answer after the
other, which turns every ten chunks or so. The largest deviation is over all partial answers; a short dip between two
agreeing scores is what refining cannot see.
"""

import argparse
import json
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from safeshape import world
from safeshape.signals.guards import load_guard
from safeshape.signals.partials import Branch
from safeshape.signals.prefix import PrefixScorer
from safeshape.signals.refine import Refine, RefineReport, filled, wanted
from safeshape.world.answers import BACKGROUND, TURN_BACK, comply
from safeshape.world.data import user_data
from safeshape.world.language import sample

LABELS = (5, 9)
SHAPES = {
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
              "num_key_value_heads": 8, "vocab_size": 32000},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--curve", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--header", type=int, default=250)
    parser.add_argument("--suffix", type=int, default=60)
    parser.add_argument("--chunk", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_tokens", type=int, default=None)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the median is given")
    parser.add_argument("--responses", type=int, default=8, help="answers of the world for refine; 0 for none")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--stride", type=int, default=Refine().stride)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def random_guard(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=16384, rope_theta=500000.0)
    torch.manual_seed(0)
    with torch.device(args.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, args.dtype))
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


class Clock:
    """CPU and wall seconds of a block; on CUDA the device is waited for."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> "Clock":
        self._sync()
        self.start = (time.process_time(), time.perf_counter())
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self.cpu, self.wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]

    def _sync(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    @property
    def cost(self) -> float:
        return self.wall if self.device.startswith("cuda") else self.cpu


def sequences(length: int, args: argparse.Namespace, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """A trunk of random tokens and the full token sequence of each of its partial answers."""
    fixed, rng = random.Random(0), random.Random(seed)
    header, suffix = ([fixed.randrange(30000) for _ in range(size)] for size in (args.header, args.suffix))
    answer = [rng.randrange(30000) for _ in range(length)]
    ends = [*range(args.chunk, length, args.chunk), length]
    return [*header, *answer, *suffix], [[*header, *answer[:end], *suffix] for end in ends]


def naive(model: LlamaForCausalLM, rows: list[list[int]], batch_size: int) -> torch.Tensor:
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    found = torch.zeros(len(rows), len(LABELS))
    head = model.lm_head.weight[list(LABELS)]
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            width = max(len(rows[row]) for row in batch)
            ids = torch.tensor([rows[row] + [0] * (width - len(rows[row])) for row in batch], device=model.device)
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            last = torch.tensor([len(rows[row]) - 1 for row in batch], device=model.device)
            found[batch] = (states[torch.arange(len(batch), device=model.device), last] @ head.T).float().cpu()
    return found


def operations(model: LlamaForCausalLM, tokens: float, pairs: float) -> float:
    """Multiplications and additions of the layers for so many tokens and (token, seen token) pairs."""
    config = model.config
    linear = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    return 2 * linear * tokens + 4 * config.hidden_size * config.num_hidden_layers * pairs


def causal(first: int, last: int) -> float:
    """Pairs of the tokens at positions [first, last) with what they see."""
    return (last * (last + 1) - first * (first + 1)) / 2


def counted(model: LlamaForCausalLM, rows: list[list[int]], trunk: list[int], suffix: int) -> dict[str, float]:
    naive_tokens = sum(map(len, rows))
    naive_work = operations(model, naive_tokens, sum(causal(0, len(row)) for row in rows))
    ours_tokens = len(trunk) + suffix * (len(rows) - 1)
    pairs = causal(0, len(trunk)) + sum(causal(len(row) - suffix, len(row)) for row in rows[:-1])
    return {
        "naive_tokens": naive_tokens,
        "least_tokens": ours_tokens,
        "naive_work": naive_work,
        "least_work": operations(model, ours_tokens, pairs),
    }


def branches_of(rows: list[list[int]], picked: list[int]) -> list[Branch]:
    return [Branch(kept=0, ids=tuple(rows[index])) for index in picked]


def ours(model: LlamaForCausalLM, trunk: list[int], rounds: list[list[Branch]], max_tokens: int | None):
    """The logits of each round of branches, and the tokens that were run."""
    scorer = PrefixScorer(model, LABELS, max_tokens=max_tokens)
    opened = scorer.open(trunk)
    return [scorer.label_logits(opened, branches) for branches in rounds], scorer.forwarded


def timed_ours(args: argparse.Namespace, model: LlamaForCausalLM, trunk: list[int], rounds: list[list[Branch]]):
    clocks = []
    for _ in range(args.repeats):
        with Clock(args.device) as clock:
            found, tokens = ours(model, trunk, rounds, args.max_tokens)
        clocks.append(clock)
    return sorted(clocks, key=lambda clock: clock.cost)[len(clocks) // 2], found, tokens


def best_batch(args: argparse.Namespace, model: LlamaForCausalLM, rows: list[list[int]]) -> int:
    """The naive batch size with the highest speed on runs of neighbours in length."""
    middle, speed = len(rows) // 2, {}
    for size in args.batch_sizes:
        sample = rows[middle : middle + max(size, 4)]
        with Clock(args.device) as clock:
            naive(model, sample, size)
        speed[size] = sum(map(len, sample)) / clock.cost
    return max(speed, key=lambda size: speed[size])


def compare(args: argparse.Namespace, model: LlamaForCausalLM, length: int) -> dict[str, float]:
    trunk, rows = sequences(length, args)
    counts = counted(model, rows, trunk, args.suffix)
    size = best_batch(args, model, rows)
    with Clock(args.device) as slow:
        want = naive(model, rows, size)
    fast, found, tokens = timed_ours(args, model, trunk, [branches_of(rows, list(range(len(rows))))])
    bound = counts["naive_work"] / counts["least_work"]
    return {
        "length": length,
        "branches": len(rows),
        "naive_batch": size,
        "naive_cpu_s": slow.cpu,
        "naive_wall_s": slow.wall,
        "ours_cpu_s": fast.cpu,
        "ours_wall_s": fast.wall,
        "ratio_cpu": slow.cpu / fast.cpu,
        "ratio_wall": slow.wall / fast.wall,
        "ratio_tokens": counts["naive_tokens"] / tokens,
        "bound": bound,
        "share_of_bound": slow.cost / fast.cost / bound,
        "ours_operations_per_s": counts["least_work"] / fast.cost,
        "naive_operations_per_s": counts["naive_work"] / slow.cost,
        "largest_logit_difference": float((want - found[0]).abs().max()),
    }


def answers(kind: str, tokenizer, length: int, count: int) -> list[str]:
    """Answers of at least `length` guard tokens, put together from the world's."""
    mixed = [row["messages"][1]["content"] for row in user_data(size=400, harmful_share=0.2, seed=1)]
    plans = sample("harmful", 40, seed=1, held_out=False)
    safe = [item.answer for name in ("borderline", "skill") for item in sample(name, 40, seed=1, held_out=False)]
    rng = random.Random(0)

    def stretched(text: str, source: list[str], size: int) -> str:
        while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < size:
            text = f"{text} {rng.choice(source)}"
        return text.strip()

    def talk(table: tuple[str, ...]) -> list[str]:
        return [line.format(target=item.target, color="red").strip() for line in table for item in plans if item.target]

    found = []
    for _ in range(count):
        text = ""
        if kind == "pasted":
            text = stretched(rng.choice(mixed), mixed, length)
        elif kind == "one turn":
            first = stretched("", talk(BACKGROUND), rng.randrange(length // 4, 3 * length // 4))
            text = stretched(f"{first} {comply(rng.choice(plans), rng)}", talk(TURN_BACK), length)
        else:
            for _ in range(max(length // 256, 1)):
                parts = [stretched(rng.choice(safe), safe, min(length // 3, 90)) for _ in range(2)]
                text = f"{text} {parts[0]} {comply(rng.choice(plans), rng)} {parts[1]}".strip()
            text = stretched(text, safe, length)
        found.append(text)
    return found


def refined(args: argparse.Namespace, model: LlamaForCausalLM, length: int, kind: str, full: dict[str, float]) -> dict:
    guard = load_guard("world", model=world.path("guard"))
    guard.model.config.max_position_embeddings = 16384
    settings, report = Refine(tolerance=args.tolerance, stride=args.stride, check_every=0), RefineReport()
    made = [sequences(length, args, seed=index) for index in range(args.responses)]
    true, scored = [], [dict[int, float]() for _ in made]
    for text, (_, rows) in zip(answers(kind, guard.tokenizer, length, args.responses), made, strict=True):
        messages = [{"role": "user", "content": "Tell me about it."}, {"role": "assistant", "content": text}]
        true.append([span.p_safe for span in guard.score(messages, chunk=args.chunk, unit="tokens")][: len(rows)])
    scorer = PrefixScorer(model, LABELS, max_tokens=args.max_tokens)
    with Clock(args.device) as clock:
        trunks = scorer.open_many([trunk for trunk, _ in made])
        while any(picked := [wanted(scored[i], len(true[i]), settings) for i in range(len(made))]):
            scorer.label_logits_many(
                [(trunk, branches_of(rows, few)) for trunk, (_, rows), few in zip(trunks, made, picked, strict=True)]
            )
            for index, few in enumerate(picked):
                scored[index] |= {at: true[index][at] for at in few}
    for asked, values in zip(scored, true, strict=True):
        report.add(asked, len(values))
        report.check(filled(asked, len(values)), values, args.tolerance)
    cpu, wall = clock.cpu / args.responses, clock.wall / args.responses
    found = {"length": length, "answers": kind, **asdict(report), "tolerance": args.tolerance}
    return found | {"ratio_cpu": full["naive_cpu_s"] / cpu, "ratio_wall": full["naive_wall_s"] / wall}


def curve(args: argparse.Namespace, model: LlamaForCausalLM) -> dict:
    """Cost per branch against the length of the answer, with and without the trunk's, and how straight the line is."""
    points, whole = [], []
    for length in args.curve:
        trunk, rows = sequences(length, args)
        times = []
        for _ in range(args.repeats):
            scorer = PrefixScorer(model, LABELS, max_tokens=args.max_tokens)
            with Clock(args.device) as opening:
                opened = scorer.open(trunk)
            with Clock(args.device) as clock:
                scorer.label_logits(opened, branches_of(rows, list(range(len(rows)))))
            times.append((clock.cost / len(rows), (clock.cost + opening.cost) / len(rows)))
        points.append(float(np.median([branch for branch, _ in times])))
        whole.append(float(np.median([both for _, both in times])))
    slope, start = np.polyfit(args.curve, points, 1)
    off = float(np.abs(np.array(points) / (start + slope * np.array(args.curve)) - 1).max())
    return {
        "lengths": args.curve,
        "seconds_per_branch": points,
        "seconds_per_branch_with_trunk": whole,
        "start_s": start,
        "slope_s_per_token": slope,
        "largest_relative_distance_from_line": off,
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model = random_guard(args)
    naive(model, [[1] * 300], 1)
    ours(model, [1] * 300, [[Branch(kept=0, ids=(1,) * 20 + (2,) * 60)]], args.max_tokens)
    device = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    record = {"settings": settings, "device": device, "versions": versions, "exact": [], "refine": [], "curve": None}
    print(f"{args.shape} in {args.dtype} on {device}, {args.threads} thread(s), {versions}")
    for length in args.lengths:
        full = compare(args, model, length)
        record["exact"].append(full)
        print(
            f"{length} tokens, {full['branches']} branches: naive {full['naive_cpu_s']:.2f} s (batch "
            f"{full['naive_batch']}), ours {full['ours_cpu_s']:.2f} s CPU; {full['ratio_cpu']:.2f}x in CPU time, "
            f"{full['ratio_wall']:.2f}x in wall time, {full['ratio_tokens']:.2f}x fewer tokens; bound "
            f"{full['bound']:.2f}x, share {full['share_of_bound']:.0%}; logits differ by at most "
            f"{full['largest_logit_difference']:.1e}; ours {full['ours_operations_per_s'] / 1e12:.3g} Tops/s, naive "
            f"{full['naive_operations_per_s'] / 1e12:.3g}",
            flush=True,
        )
        for kind in ("one turn", "turns", "pasted") if args.responses else ():
            part = refined(args, model, length, kind, full)
            record["refine"].append(part)
            print(
                f"  refine, {kind}: {part['scored']} of {part['ends']} ends; {part['ratio_cpu']:.1f}x CPU, "
                f"{part['ratio_wall']:.1f}x wall; largest deviation {part['largest_deviation']:.3f}, upwards "
                f"{part['largest_overrating']:.3f}; {part['beyond']} of {part['checked_ends']} beyond the tolerance",
                flush=True,
            )
    if len(args.curve) > 2:
        record["curve"] = curve(args, model)
        shown = zip(args.curve, *(record["curve"][key] for key in list(record["curve"])[1:3]), strict=True)
        line = ", ".join(f"{length}: {one * 1e3:.2f} ({both * 1e3:.2f})" for length, one, both in shown)
        print(
            f"ms per branch by length (with its share of the trunk): {line}; at most "
            f"{record['curve']['largest_relative_distance_from_line']:.1%} from a straight line"
        )
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
