"""`safeshape eval theorem`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeshape.config import EvalTheoremConfig, parse


def main(argv: Sequence[str]) -> str:
    """Measure, write the figures and return them as text. Errors: ValueError in one sentence."""
    config = parse(EvalTheoremConfig, "eval theorem", argv)
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_dir {output} is not an empty folder")
    from safeshape import world
    from safeshape.evals.theorem import Settings, as_text, measure
    from safeshape.models import load
    from safeshape.report.drawing import save
    from safeshape.report.tables import WORLD_NOTE
    from safeshape.report.theorem_figure import theorem_figure
    from safeshape.signals.ensembles import load_scorer
    from safeshape.sources import model_path
    from safeshape.verbs.bars import bars

    settings = Settings(
        chunks=tuple(config.chunks),
        taus=tuple(config.taus),
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    prompts, harm = _asked(config)
    (policy, tokenizer), (reference, other) = (
        load(model_path(name), dtype=config.dtype) for name in (config.model_name_or_path, config.reference)
    )
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError("the model and its reference have different tokenizers, so their answers cannot be compared")
    source = world.path("guard") if config.guard == "world" else None
    guard = load_scorer(config.guard, model=config.guard_model or source, device=config.device)
    with bars() as progress:
        found = measure(
            policy.to(config.device), reference.to(config.device), tokenizer, prompts, harm, guard, settings, progress
        )
    note = WORLD_NOTE if config.tasks == "world" else ""
    text = as_text(found) + (f"\n\n{note}" if note else "")
    output.mkdir(parents=True, exist_ok=True)
    content = {"world": bool(note), "config": asdict(config), "found": asdict(found)}
    (output / "theorem.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    (output / "theorem.txt").write_text(text + "\n")
    written = save(theorem_figure(found, note), output / "theorem")
    return f"{text}\nWrote {output}/theorem.json, theorem.txt, {', '.join(path.name for path in written)}"


def _asked(config: EvalTheoremConfig) -> tuple[list[Any], Callable[[int, str], bool]]:
    """The prompts and what judges an answer to them."""
    if config.tasks == "world":
        from safeshape.world import data, oracle

        tasks = {task.name: task for task in data.tasks(size=config.prompts, seed=config.seed)}
        return list(tasks["attack_success"].prompts), lambda index, answer: oracle.harmful(answer)
    import importlib

    from safeshape.data import as_messages
    from safeshape.verbs.scored_rows import scored_rows

    module, _, name = config.judge.partition(":")
    try:
        judge: Callable[[Any, str], bool] = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise ValueError(f"cannot import judge {config.judge!r}: {error}") from error
    prompts: list[Any] = []
    for place, row in enumerate(scored_rows(config.tasks)):
        prompts.append(_prompt(row, f"{config.tasks}: row {place}", as_messages))
        if len(prompts) == config.prompts:
            break
    return prompts, lambda index, answer: bool(judge(prompts[index], answer))


def _prompt(row: dict[str, Any], where: str, as_messages: Callable[[dict[str, Any]], list[Any]]) -> list[Any]:
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    if "messages" not in row:
        raise ValueError(f"{where} needs `messages` or a text in `prompt`; it has: {', '.join(map(str, row))}")
    messages = list(as_messages(row))
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise ValueError(f"{where} holds no request")
    return asked
