"""Small trainers for the tests: eight scored rows, a tiny model, settings that make runs comparable."""

import torch
from conftest import conversation, tiny_model
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from safeshape import SafeTrainer

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "safe",
    "unsafe",
    "fox",
    "dog",
    "cat",
]


def rows(count=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        pick = [WORDS[i] for i in torch.randint(0, len(WORDS), (10,), generator=g)]
        answer = " ".join(pick[3 : 5 + int(torch.randint(0, 5, (), generator=g))])
        half = len(answer) // 2
        p = torch.rand(2, generator=g).tolist()
        spans = [{"start": 0, "end": half, "p_safe": p[0]}, {"start": half, "end": len(answer), "p_safe": p[1]}]
        made.append(
            {
                "messages": conversation(" ".join(pick[:3]), answer),
                "safety": {"signal": "test", "p_safe": p[1], "spans": spans},
            }
        )
    return made


def config(folder, **settings):
    base = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 128,
    }
    return SFTConfig(**{**base, **settings})


def make(folder, tokenizer, *, data=None, model=None, policy="star", settings=None, **options):
    return SafeTrainer(
        tiny_model() if model is None else model,
        config(folder, **(settings or {})),
        train_dataset=Dataset.from_list(rows() if data is None else data),
        processing_class=tokenizer,
        policy=policy,
        **options,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lora(**options):
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
