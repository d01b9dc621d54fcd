"""`safeshape train`."""

from collections.abc import Sequence

from safeshape.config import TrainConfig, parser_for

_MORE = """
Every flag of TRL's SFTConfig and ModelConfig works under its TRL name as well; these are the ones you need:
  --model_name_or_path PATH  folder or Hub id of the model; world:llama, world:qwen3, world:phi3 are built in
  --output_dir FOLDER        where the model, its safeshape.json and train_results.json go
  --learning_rate, --num_train_epochs, --per_device_train_batch_size, --gradient_accumulation_steps,
  --max_length, --use_peft, --lora_r, --seed, --resume_from_checkpoint, ...
`safeshape train --help_all` lists all of them.
"""


def main(argv: Sequence[str]) -> str:
    """Train a model. Errors: ValueError in one sentence."""
    if "--help" in argv or "-h" in argv:
        return parser_for(TrainConfig, "train").format_help() + _MORE.rstrip()
    from safeshape.train import parser, train

    if "--help_all" in argv:
        return str(parser().format_help())
    from safeshape.verbs.bars import bars

    with bars() as progress:
        folder = train(argv, lambda done, total: progress("scored", done, total))
    return f"Wrote the model and its safeshape.json to {folder}"
