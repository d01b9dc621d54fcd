"""One process of a distributed run: `accelerate launch ... worker.py FOLDER SPECS_JSON`; the main one writes losses."""

import json
import os
import sys
from pathlib import Path

import accelerate.state
import conftest
from accelerate.utils import DistributedType, gather_object
from judging import Judge
from training import lora, losses, make, rows

from safeshape.onpolicy import OnPolicy

SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def allow_sharding_on_a_cpu():
    """accelerate takes FSDP for GPUs only, though torch's `fully_shard` runs on CPUs as well."""
    begin = accelerate.state.PartialState.__init__

    def started(self, *arguments, **options):
        begin(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = started


def run(folder, spec, processes):
    settings = {"optim": "sgd", "max_steps": 3, "per_device_train_batch_size": 4 // processes}
    options = {"peft_config": lora()} if spec["lora"] else {}
    if "every" in spec:
        options["on_policy"] = OnPolicy(judge=Judge(), every=spec["every"], wait_s=60.0, max_new_tokens=8)
        options["data"] = [{"messages": row["messages"]} for row in rows()]
    trainer = make(
        folder,
        conftest.byte_bpe(),
        policy=spec["policy"],
        reference=spec["reference"],
        settings=settings,
        **options,
    )
    trainer.train()
    states = [None] if trainer.critic is None else gather_object([trainer.critic.state()])
    entries = [entry for entry in trainer.state.log_history if "kl" in entry]
    return {
        "loss": losses(trainer),
        "kl": [entry["kl"] for entry in entries],
        "kl_weight": [entry["kl_weight"] for entry in entries],
        "num_tokens": entries[-1]["num_tokens"],
        "processes": trainer.accelerator.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
        "head": trainer.loss_head,
        "verdicts": states[0],
        "verdicts_of_the_other": states[-1],
        "shards": len(trainer.reference.cache.shards) if spec["reference"] == "cached" else None,
    }


if __name__ == "__main__":
    import safeshape.caching

    safeshape.caching.SHARD_BYTES = 2000  # several shards, so that the processes share them out
    if SHARDED:
        allow_sharding_on_a_cpu()
    folder, specs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = [run(folder / str(number), spec, world) for number, spec in enumerate(specs)]
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found))
