"""Step time and memory of whole training steps, side by side in one run.

    python bench/train.py                                                  # this CPU, float32, tiny model, LoRA
    python bench/train.py --device cuda --dtype bfloat16 --shape llama-8b --vocab 128256 --length 2048 --checkpointing

Every method trains the same rows with `Trainer.train()`; rounds of a few steps are interleaved and the median step is
shown. Memory is the peak of a few steps in a process of its own, less what the process held before the model was made
(peak resident set on a CPU, the allocator's peak on a GPU).

`sft`: TRL's SFTTrainer. `cached`, `adapter_off`, `copy`: SafeTrainer, policy `star`, with that reference; writing the
states is not part of a step, and its time is shown apart. `paper`: the adaptive paper's way: a second model, a forward
of its own, full logits of both, `alpha * CE + beta * KL`. `trl`: TRL's two fused passes, `ChunkedLogProbFunction` and
`ChunkedDivergenceFunction`, over the response tokens of live adapter-off hidden states. `liger`: the same with Liger's
fused JSD at beta 1, where installed.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from head import TRL_VOCAB_CHUNK, resident
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from safeshape import SafeTrainer
from safeshape.data import micro_batch
from safeshape.models import add_shaped_forward, read_head
from safeshape.models.reference import AdapterOff, causal_model, frozen_copy

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
Setting = dict[str, Any]
BETA = 0.5


class Steps(TrainerCallback):
    """Seconds of each step but the first of a run."""

    def __init__(self, clock: Any, device: str) -> None:
        self.clock, self.device, self.seconds, self.start = clock, device, [], 0.0

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return self.clock()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.seconds.append(self.now() - self.start)


class PaperTrainer(SFTTrainer):
    """Second model, full logits of both, two forwards."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        with torch.no_grad():
            ref_logits = self.second(**inputs, use_cache=False).logits[:, :-1].float()
        mask = labels != -100
        ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        kl = (F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * mask).sum() / mask.sum()
        return (1 - BETA) * ce + BETA * kl


class TwoPassTrainer(SFTTrainer):
    """Hidden states of the response tokens and the live reference, then a fused loss of someone else's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = torch.zeros_like(inputs["labels"], dtype=torch.float32)
        batch = micro_batch({**inputs, "p_safe": tokens, "answer_p_safe": tokens})
        ref_hidden = AdapterOff().states(model, self.accelerator.unwrap_model(model), batch).hidden_NH
        labels = batch.labels_BT[batch.counted_BT]

        def shaped(causal, output):
            weight, hidden = read_head(causal).weight_VH, output.last_hidden_state[:, :-1][batch.counted_BT]
            return {"loss": self.fused(hidden, weight, ref_hidden, labels)}

        return model(**batch.forward, shaped=shaped)["loss"]


def trl_loss(hidden, head, ref_hidden, labels):
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    logp = ChunkedLogProbFunction.apply(hidden, head, None, labels, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ())[0]
    kl = ChunkedDivergenceFunction.apply(hidden, head, None, ref_hidden, head, None, 1.0)[0]
    return (BETA * kl - (1 - BETA) * logp).sum() / len(labels)


def liger_loss(hidden, head, ref_hidden, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(beta=1.0, compiled=False)(hidden, head, ref_hidden, head, labels)


METHODS = ["sft", "cached", "adapter_off", "copy", "paper", "trl"]
METHODS += ["liger"] if importlib.util.find_spec("liger_kernel") else []


def rows(setting: Setting) -> Dataset:
    """Random tokens; the second half of each row is its response, with a score per chunk of eight tokens."""
    g = torch.Generator().manual_seed(0)
    length, count = setting["length"], setting["batch"] * setting["steps"]
    ids = torch.randint(3, setting["vocab"], (count, length), generator=g)
    labels = ids.clone()
    labels[:, : int(length * (1 - setting["response"]))] = -100
    p_safe = torch.rand(count, length // 8 + 1, generator=g).repeat_interleave(8, dim=1)[:, :length]
    columns = {"input_ids": ids, "labels": labels, "p_safe": p_safe, "answer_p_safe": p_safe}
    return Dataset.from_dict({name: value.tolist() for name, value in columns.items()})


def make(setting: Setting, method: str) -> SFTTrainer:
    """A trainer ready to run."""
    torch.manual_seed(0)
    shape = SHAPES[setting["shape"]]
    with torch.device(setting["device"]):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=setting["vocab"], max_position_embeddings=setting["length"], **shape)
        ).to(getattr(torch, setting["dtype"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")), eos_token="</s>"
    )
    args = SFTConfig(
        output_dir=setting["folder"],
        max_steps=setting["steps"],
        per_device_train_batch_size=setting["batch"],
        learning_rate=1e-4,
        max_length=None,
        bf16=False,
        use_cpu=setting["device"] == "cpu",
        gradient_checkpointing=setting["checkpointing"],
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    adapter = None if setting["full"] else LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    options: dict[str, Any] = {"train_dataset": rows(setting), "processing_class": tokenizer, "peft_config": adapter}
    if method in ("cached", "adapter_off", "copy"):
        return SafeTrainer(model, args, policy="star", reference=method, gradient_floor=0.0, **options)
    if method == "paper":
        trainer: SFTTrainer = PaperTrainer(model, args, **options)
        trainer.second = frozen_copy(trainer.model.get_base_model() if adapter else trainer.model)
        return trainer
    if method in ("trl", "liger"):
        trainer = TwoPassTrainer(model, args, **options)
        trainer.fused = {"trl": trl_loss, "liger": liger_loss}[method]
        add_shaped_forward(causal_model(trainer.model))
        return trainer
    return SFTTrainer(model, args, **options)


def times(setting: Setting) -> dict[str, Setting]:
    """Median seconds of a step, rounds interleaved."""
    clock = time.process_time if setting["clock"] == "cpu" else time.perf_counter
    trainers, watches, found = {}, {}, {}
    for method in setting["methods"]:
        trainers[method], watches[method] = make(setting, method), Steps(clock, setting["device"])
        trainers[method].remove_callback(PrinterCallback)
        trainers[method].add_callback(watches[method])
        found[method] = {}
        if method == "cached":
            start = watches[method].now()
            trainers[method]._open_store()
            trainers[method]._start()
            found[method]["writing_states_seconds"] = watches[method].now() - start
    for _ in range(setting["rounds"]):
        for trainer in trainers.values():
            trainer.train()
    for method, watch in watches.items():
        found[method]["seconds"] = statistics.median(watch.seconds)
    return found


def peak(setting: Setting, method: str) -> int:
    """Bytes at the peak of a few steps, over what the process held before there was a model."""
    prepare(setting)
    with tempfile.TemporaryDirectory() as folder:
        setting = {**setting, "folder": folder}
        if setting["device"] != "cpu":
            trainer = make(setting, method)
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return torch.cuda.max_memory_allocated()
        small = {**setting, "shape": "tiny", "vocab": 512, "length": 16}
        make(small, method).train()
        before = resident("VmRSS")
        trainer = make(setting, method)
        trainer.train()
        return resident("VmHWM") - before


def measure(setting: Setting) -> list[Setting]:
    shown = {
        name: setting[name] for name in ("shape", "vocab", "length", "batch", "response", "dtype", "device", "full")
    }
    with tempfile.TemporaryDirectory() as folder:
        found = times({**setting, "folder": folder})
    lines = []
    for method, figures in found.items():
        line = {**shown, "method": method, **figures}
        line["tokens_per_second"] = setting["batch"] * setting["length"] / figures["seconds"]
        if not setting["no_memory"]:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                line["peak_bytes"] = pool.apply(peak, (setting, method))
        lines.append(line)
    for line in lines:
        for name in ("seconds", "peak_bytes"):
            if "sft" in found and name in line:
                line[f"{name}_over_sft"] = line[name] / lines[list(found).index("sft")][name]
    return lines


def show(lines: list[Setting]) -> None:
    first = lines[0]
    print(f"\n{first['shape']}, V {first['vocab']}, {first['batch']} x {first['length']} tokens, {first['dtype']}")
    print(f"{'method':14}{'ms/step':>10}{'tokens/s':>11}{'/ sft':>8}{'peak MB':>10}{'/ sft':>8}")
    for line in lines:
        memory = f"{line['peak_bytes'] / 1e6:10.0f}{line['peak_bytes_over_sft']:8.2f}" if "peak_bytes" in line else ""
        note = f"   writing states {line['writing_states_seconds']:.2f} s" if "writing_states_seconds" in line else ""
        print(
            f"{line['method']:14}{line['seconds'] * 1e3:10.1f}{line['tokens_per_second']:11.0f}"
            f"{line['seconds_over_sft']:8.3f}{memory}{note}",
            flush=True,
        )
    seconds = {line["method"]: line["seconds"] for line in lines}
    for ours, other in (("cached", "adapter_off"), ("cached", "paper"), ("adapter_off", "paper"), ("copy", "paper")):
        if ours in seconds and other in seconds:
            print(f"{ours} / {other}: {seconds[ours] / seconds[other]:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--length", type=int, nargs="+", default=[256])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--response", type=float, default=0.5, help="share of a row that is response")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a machine that others load")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    return parser.parse_args()


def prepare(setting: Setting) -> None:
    """Quiet libraries, and the number of threads."""
    torch.set_num_threads(setting["threads"])
    disable_progress_bars()
    logging.set_verbosity_error()


def main() -> None:
    args = arguments()
    setting = vars(args)
    if args.full:
        live = [m for m in args.methods if m in ("adapter_off", "trl", "liger")]
        setting["methods"] = [m for m in args.methods if m not in live]
    prepare(setting)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.device}, {args.dtype}, {args.threads} threads")
    found = []
    for vocab in args.vocab:
        for length in args.length:
            found.append(measure({**setting, "vocab": vocab, "length": length}))
            show(found[-1])
    if args.output:
        args.output.write_text(json.dumps([line for lines in found for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    main()
