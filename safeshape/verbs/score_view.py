"""`safeshape score view`."""

from collections.abc import Sequence
from pathlib import Path

from safeshape.config import ScoreViewConfig, parse


def main(argv: Sequence[str]) -> str:
    """Write the page and the figure that are asked for. Errors: ValueError in one sentence."""
    config = parse(ScoreViewConfig, "score view", argv)
    wanted = [] if config.output is None else [Path(config.output)]
    if config.figure is not None:
        wanted += [Path(config.figure).with_suffix(suffix) for suffix in (".png", ".svg", ".json")]
    for path in wanted:
        if path.exists():
            raise ValueError(f"output {path} exists already")
    from safeshape.report.from_world import is_world
    from safeshape.report.trajectories import mean_trajectory, write_progress
    from safeshape.report.view_page import Example, counts, scorers, write_view
    from safeshape.signals.scored import Scored, scored
    from safeshape.verbs.scored_rows import scored_rows

    examples: list[Example] = []
    groups: dict[str, list[Scored]] = {}
    for name in config.dataset_name:
        if config.group_by is None:
            groups[name] = []
        for index, row in enumerate(scored_rows(name, config.dataset_split)):
            try:
                if config.group_by is not None and config.group_by not in row:
                    raise ValueError(f"has no column {config.group_by!r}; it has: {', '.join(map(str, row))}")
                item = scored(row)
            except ValueError as error:
                raise ValueError(f"{name}: row {index}: {error}") from error
            examples.append(Example(source=name, row=index, item=item))
            groups.setdefault(name if config.group_by is None else str(row[config.group_by]), []).append(item)
    found = counts(examples)
    lines = [", ".join(f"{n} {name}" for name, n in found.items())]
    if config.output is not None:
        write_view(Path(config.output), examples, sort=config.sort, limit=config.limit)
        lines.append(f"Wrote {min(len(examples), config.limit)} rows to {config.output}")
    if config.figure is not None:
        names = _short(list(groups))
        means = [mean_trajectory(names[group], items, seed=config.seed) for group, items in groups.items()]
        who = scorers(examples)
        world = any(is_world(item["scorer"]) for item in who)
        written = write_progress(Path(config.figure), means, scorers=who, world=world)
        lines.append(f"Wrote {', '.join(map(str, written))}")
    return "\n".join(lines)


def _short(names: Sequence[str]) -> dict[str, str]:
    """File names without folder and ending, where they stay different."""
    stems = {name: Path(name).stem if Path(name).exists() else name for name in names}
    return stems if len(set(stems.values())) == len(names) else {name: name for name in names}
