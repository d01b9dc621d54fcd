"""`safeshape attack`, and `safeshape attack list`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import AttackConfig, parse, read_yaml

if TYPE_CHECKING:
    from safeshape.attacks import Attacked, Pools
    from safeshape.attacks.adaptive import Scorer

WORLD = "Pools, prompts and texts are the embedded world's: a test bench, never evidence about real models."
TEXTS = ("text", "trigger", "persona", "declaration", "template", "opening")


def main(argv: Sequence[str]) -> str:
    """List the attacks, or run one and say what it changed. Errors: ValueError in one sentence."""
    if argv and argv[0] == "list":
        return listing(argv[1:])
    config = parse(AttackConfig, "attack", argv)
    for path in (Path(config.output), report_path(config.output)):
        if path.exists():
            raise ValueError(f"output {path} exists already")
    return attack_prompts(config) if _on_prompts(config) else attack_data(config)


def report_path(output: str) -> Path:
    """Where the report of an output goes."""
    return Path(f"{output}.report.json")


def listing(argv: Sequence[str]) -> str:
    """A table of the attacks. Errors: ValueError for any flag: it has none."""
    if argv:
        raise ValueError(f"attack list takes no settings, got {argv[0]!r}")
    from safeshape.attacks import DATA_ATTACKS, PROMPT_ATTACKS

    rows = [("name", "kind", "what it changes", "source")]
    rows += [(name, "data", attack.changes, attack.source) for name, attack in DATA_ATTACKS.items()]
    rows += [(name, "prompt", found.changes, found.source) for name, found in PROMPT_ATTACKS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "Your own: module:function; docs/attacks.md says what it is given."])


def _on_prompts(config: AttackConfig) -> bool:
    """Whether the attack is one on prompts: by its name, or for a user's own by what it is given."""
    from safeshape.attacks import DATA_ATTACKS, PROMPT_ATTACKS

    names = [part for name in config.attack for part in name.split("+")]
    on_prompts = [name in PROMPT_ATTACKS or (":" in name and config.prompts is not None) for name in names]
    if any(on_prompts):
        for name, right in zip(names, on_prompts, strict=True):
            if not right and name in DATA_ATTACKS:
                raise ValueError(f"attack {name!r} is on data and cannot be combined with one on prompts")
        return True
    if len(config.attack) > 1:
        raise ValueError("give one attack on data; several can be combined on prompts only")
    return False


def _parameters(config: AttackConfig, names: Sequence[str]) -> dict[str, Any]:
    """The parameters given, texts read from their files, over the world's texts where the world is asked for."""
    from safeshape.world import pools as world_pools

    given = {key: _text(value) if key in TEXTS else value for key, value in config.given().items()}
    if config.world:
        for name in names:
            given = {**world_pools.texts(name), **given}
    return given


def _text(value: Any) -> Any:
    """A text, or what is in the file after an @, without its last line break."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the text in {value[1:]}: {error}") from error


def rows_of(name: str, split: str) -> list[Any]:
    """The rows of a dataset; a .json file may also hold a list of conversations, each a list of messages.

    Errors: ValueError that names the file.
    """
    from safeshape.sources import open_source

    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from error
        if isinstance(content, list):
            return content
    return list(open_source(name, split).rows())


def _pools(config: AttackConfig) -> Pools:
    from safeshape.attacks import Pools
    from safeshape.attacks.records import POOLS
    from safeshape.attacks.rows import conversations_of
    from safeshape.world import pools as world_pools

    base = world_pools.pools(seed=config.seed) if config.world else Pools()
    own = {
        pool: conversations_of(rows_of(vars(config)[pool], config.dataset_split), vars(config)[pool])
        for pool in POOLS
        if vars(config)[pool] is not None
    }
    return replace(base, **own)


def attack_data(config: AttackConfig) -> str:
    """Poison data, write it and its report."""
    from safeshape.attacks import data_attack

    name = config.attack[0]
    if config.prompts is not None:
        raise ValueError(f"attack {name!r} is on data; leave out --prompts")
    parameters = _parameters(config, [name])
    if name == "identity_shift" and config.identity is not None:
        for key in ("persona", "declaration"):  # the world's texts; a user's own are refused by the attack
            if vars(config)[key] is None:
                parameters.pop(key, None)
    if name == "adaptive":
        parameters |= _adaptive(config)
    elif config.guard or config.probe or config.rewrites or config.padding:
        raise ValueError("guard, probe, rewrites and padding belong to the adaptive attack")
    attack = data_attack(name, {key: value for key, value in parameters.items() if key != "score"})
    pools = _pools(config)
    if name == "adaptive":  # loaded last: what is cheap to refuse has been
        parameters["score"], seen = _scorer(config)
        attack = data_attack(name, parameters)
    poisoned = attack(pools, size=config.size, seed=config.seed)
    report = dict(poisoned.report) | ({"scorer": seen} if name == "adaptive" else {})
    _write(config, poisoned.dataset, report)
    sorts = ", ".join(f"{count} {origin}" for origin, count in report["rows_by_origin"].items())
    lines = [f"Wrote {report['size']} rows to {config.output}, {report['poisoned']} of them poisoned: {sorts}"]
    if name == "adaptive":
        lines.append(_told(report["scores"]))
    return "\n".join([*lines, *([WORLD] if config.world else [])])


def _told(scores: Mapping[str, Any]) -> str:
    read = scores["rows"] - scores["never_scored"]
    if not read:
        return "The scorer failed on every row, so none was edited"
    return (
        f"p_safe of {read} rows, mean: {scores['mean_p_safe_before']:.3f} before, {scores['mean_p_safe_after']:.3f} "
        f"after; at the target {scores['target']}: {scores['at_target_before']} before, {scores['at_target_after']} "
        f"after; {scores['queries']} queries, {scores['failed_queries']} of them failed"
    )


def _adaptive(config: AttackConfig) -> dict[str, Any]:
    """What the adaptive attacker writes with. Errors: ValueError for a missing guard or a bad file."""
    if not (config.guard or config.probe or config.world):
        raise ValueError("the adaptive attack needs the scorer it sees; give --guard or --probe")
    found: dict[str, Any] = {}
    if config.padding is not None:
        found["padding"] = [line for line in str(_text(f"@{config.padding}")).splitlines() if line.strip()]
    if config.rewrites is not None:
        found["rewrites"] = read_yaml(config.rewrites)
    return found


def _scorer(config: AttackConfig) -> tuple[Scorer, Any]:
    """What the attacker sees, and its identity."""
    from safeshape import world
    from safeshape.attacks.adaptive import scorer_of
    from safeshape.config import ScoreConfig
    from safeshape.signals.probes import Probe
    from safeshape.signals.scorers import open_scorer

    if config.probe:
        if not (Path(config.probe) / "probe.json").is_file():
            raise ValueError(f"{config.probe} is no folder of a probe")
        probe = Probe.from_pretrained(config.probe)
        return scorer_of(probe.score_many, config.score_by), probe.identity()
    row = config.guard or "world"
    model = config.guard_model or (world.path("guard") if row == "world" else None)
    chunk = 5 if config.score_by == "min" else 10**6  # one chunk: nothing but the whole answer is read
    settings = ScoreConfig(dataset_name="", output="", guard=[row], chunk=chunk)
    opened = open_scorer(settings, [model])
    return scorer_of(opened.score, config.score_by), opened.scorer


def attack_prompts(config: AttackConfig) -> str:
    """Attack prompts, write every attempt and a report."""
    from safeshape.attacks import prompt_attack, run_prompts
    from safeshape.attacks.prompts import report_of
    from safeshape.attacks.rows import as_row, prompts_of
    from safeshape.world import pools as world_pools

    for name in ("benign", "harmful", "safe", "identity"):
        if vars(config)[name] is not None:
            raise ValueError(f"{name} is a pool of attacks on data; an attack on prompts reads --prompts")
    if config.prompts is None and not config.world:
        raise ValueError("an attack on prompts needs prompts; give --prompts")
    names = [part for name in config.attack for part in name.split("+")]
    parameters = _parameters(config, names)
    if config.tokenizer is not None:
        parameters["tokenizer"] = _tokenizer(config.tokenizer)
    attack = prompt_attack(config.attack, parameters)
    originals: list[Any] = []
    if config.prompts is None:
        size = {} if config.size is None else {"size": config.size}
        prompts: list[Attacked] = world_pools.prompts(seed=config.seed, **size)
    else:
        originals = rows_of(config.prompts, config.dataset_split)
        columns = {"prompt_column": config.prompt_column, "target_column": config.target_column}
        prompts = prompts_of(originals, config.prompts, **columns)
        if config.size is not None:
            if not 1 <= config.size <= len(prompts):
                raise ValueError(f"size is {config.size}, but there are {len(prompts)} prompts")
            prompts = prompts[: config.size]
    attempts = run_prompts(attack, prompts, seed=config.seed)
    rows = []
    for index, tried in enumerate(attempts):
        more = originals[index] if originals and isinstance(originals[index], dict) else {}
        for place, attempt in enumerate(tried):
            rows.append({**more, **as_row(attempt, prompt_index=index, attempt_index=place)})
    report = report_of(prompts, attempts, attack=" ".join(config.attack), seed=config.seed)
    _write(config, rows, report)
    line = f"Wrote {report['attempts']} attempts at {report['prompts']} prompts to {config.output}"
    return "\n".join([line, *([WORLD] if config.world else [])])


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from safeshape.sources import model_path

    return AutoTokenizer.from_pretrained(model_path(name))


def _write(config: AttackConfig, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """The rows, then the report, which says where they are from."""
    from safeshape.sources import schema_of, write_rows

    output = Path(config.output)
    schema = None if output.suffix == ".jsonl" else schema_of(rows)
    write_rows(output, rows, schema)
    made = {**report, "world": config.world, "output": output.name}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in made.items()]  # a fact a line
    report_path(config.output).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
