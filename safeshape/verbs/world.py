"""`safeshape world`."""

from collections.abc import Sequence
from pathlib import Path

from safeshape.config import WorldConfig, parse


def main(argv: Sequence[str]) -> str:
    """Build or list the world's models. Errors: ValueError in one sentence."""
    config = parse(WorldConfig, "world", argv)
    from safeshape import world

    if config.action == "show" or config.output_dir is None:
        return "\n".join(f"world:{name:11}{world.path(name)}" for name in world.NAMES)
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not empty")
    from safeshape.verbs.bars import bars
    from safeshape.world.build import build

    with bars() as progress:
        build(folder, seed=config.seed, only=tuple(config.only), progress=progress)
    return f"Wrote {', '.join(config.only)} to {folder}"
