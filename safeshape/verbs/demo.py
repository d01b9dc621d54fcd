"""`safeshape demo`."""

from collections.abc import Sequence

from safeshape.config import DemoConfig, parse


def main(argv: Sequence[str]) -> str:
    """Run the demo and return its table. Errors: ValueError in one sentence."""
    config = parse(DemoConfig, "demo", argv)
    from safeshape.demo import run
    from safeshape.report import WORLD_NOTE, text_table
    from safeshape.verbs.bars import bars

    with bars() as progress:
        demo = run(config, progress)
    facts = "\n".join(f"{name}: {value}" for name, value in demo.facts.items())
    return f"{text_table(demo.rows)}\n\n{facts}\n{WORLD_NOTE}\nWrote {config.output_dir}/report.html and results.json"
