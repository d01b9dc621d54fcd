"""The critic that a command names: fitted, asked and cached before training, or made ready to judge during it.

The main process asks; the others read what it put into the store, so that all train on the same rows.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from safeshape import world
from safeshape.config import ScoreConfig, TrainConfig, validated
from safeshape.config.judge import JudgeSettings, judge_kind
from safeshape.models import load
from safeshape.onpolicy import OnPolicy
from safeshape.policies import resolve_policy
from safeshape.signals.column import Engine, fill, scored_rows
from safeshape.signals.engines import Item, local
from safeshape.signals.judges import Judge, Judging
from safeshape.signals.probes import Probe, Prompt
from safeshape.signals.scorers import fingerprint, open_scorer
from safeshape.sources import open_source
from safeshape.store import Store
from safeshape.train.settings import Settings
from safeshape.types import Score
from safeshape.world import data as world_data
from safeshape.world.judge import load_judge

logger = logging.getLogger("safeshape")
Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class Critic:
    """What a run trains with. `notes`: for its record. `fitted`: a probe that was fitted for this run."""

    dataset: Dataset
    probe: Probe | None = None
    fitted: Probe | None = None
    on_policy: OnPolicy | None = None
    judge: Judging | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def counted(self) -> dict[str, Any]:
        """The notes, with what the judge was asked."""
        return self.notes if self.judge is None else {**self.notes, "judge": self.judge.counters()}


def store_path(config: TrainConfig, output_dir: str) -> Path:
    """The file that keeps what the critic said; beside the output folder, which may be uploaded."""
    return Path(config.store or f"{output_dir.rstrip('/')}.store.sqlite")


@contextmanager
def open_critic(dataset: Dataset, settings: Settings, model_name: str, progress: Progress) -> Iterator[Critic]:
    """The critic that the settings name, its scores in the dataset's `safety` column where it scores beforehand.

    Errors: ValueError in one sentence, with the count of rows that got no score.
    """
    config, args, _ = settings
    if not config.critic:
        yield Critic(dataset=dataset)
        return
    path = store_path(config, args.output_dir)
    judge = _judge(config, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Store(path) as store:
            if judge is not None:
                yield _with_judge(dataset, config, judge, store, progress)
            elif config.guard:
                yield _with_guard(dataset, config, str(args.device), store, progress)
            else:
                yield _with_probe(dataset, settings, model_name, store, progress)
    finally:
        if judge is not None:
            judge.close()


def _judge(config: TrainConfig, path: Path) -> Judging | None:
    """The judge; its server is greeted before anything is trained, and its model looked at."""
    if config.judge is None:
        return None
    named = {} if config.judge_model is None else {"judge_model": config.judge_model}
    further = config.judge_settings if isinstance(config.judge_settings, dict) else {}
    settings = validated(JudgeSettings, {**further, "judge": config.judge, **named})
    settings.check_kinds(config.judge)
    path.parent.mkdir(parents=True, exist_ok=True)
    keeps = {"store": path} if judge_kind(config.judge) in ("process", "server") else {}
    judge = load_judge(config.judge, **settings.judge_settings(config.judge), **keeps)
    if isinstance(judge, Judge):
        try:
            judge.maker()
        except ValueError:
            judge.close()
            raise
    return judge


def _with_judge(dataset: Dataset, config: TrainConfig, judge: Judging, store: Store, progress: Progress) -> Critic:
    if config.judge_mode == "on_policy":
        on_policy = OnPolicy(
            judge=judge,
            every=config.judge_every,
            wait_s=config.judge_wait_s,
            max_new_tokens=config.judge_max_new_tokens,
            degradation=config.judge_degradation,
            store=store,
        )
        return Critic(dataset=dataset, on_policy=on_policy, judge=judge)
    maker = judge.maker() if isinstance(judge, Judge) else judge.identity()
    engine = local(judge.score_many, block=None)
    found, notes = scored(
        dataset, engine, store, maker=maker, scorer=judge.identity(), config=config, signal="judge", progress=progress
    )
    return Critic(dataset=found, judge=judge, notes=notes)


def _with_guard(dataset: Dataset, config: TrainConfig, device: str, store: Store, progress: Progress) -> Critic:
    """The same scores, under the same keys, as `safeshape score`."""
    named = {"guard": config.guard, "guard_model": [config.guard_model] if config.guard_model else []}
    asked = {"dataset_name": config.dataset_name, "output": "-", "chunk": config.chunk, "device": device}
    score = validated(ScoreConfig, {**asked, **named})
    given: list[str | None] = list(score.guard_model) or [None] * len(score.guard)
    sources = [world.path("guard") if g == "world" and not m else m for g, m in zip(score.guard, given, strict=True)]
    opened = open_scorer(score, sources)
    found, notes = scored(
        dataset,
        local(opened.score),
        store,
        maker=opened.maker,
        scorer=opened.scorer,
        config=config,
        signal="star",
        progress=progress,
    )
    return Critic(dataset=found, notes=notes)


def _with_probe(dataset: Dataset, settings: Settings, model_name: str, store: Store, progress: Progress) -> Critic:
    """A probe that is read off the reference's pass where that is possible, and else scores the prompts before."""
    config, args, model_args = settings
    policy = resolve_policy(config.policy or "")
    # The risk of a whole batch must be known before its forward: stored states know it, a live reference does not.
    whole = policy.parameters.get("scope") == "batch" and config.reference != "cached"
    online = policy.needs_reference and not whole
    kept = Path(args.output_dir) / "probe"
    saved = kept if args.resume_from_checkpoint and (kept / "probe.json").exists() else config.probe
    fits = saved is None or saved == "world"
    if not fits and online:
        return Critic(dataset=dataset, probe=Probe.from_pretrained(str(saved), weights_only=True))
    dtype, revision = model_args.dtype or "float32", model_args.model_revision
    model, tokenizer = load(model_name, revision=revision, dtype=dtype)
    model.to(args.device)
    if fits:
        prompts, labels, groups = _prompts(config, model_name)
        with PartialState().main_process_first():
            probe = Probe.fit(
                prompts,
                labels,
                model=model,
                tokenizer=tokenizer,
                layers=_layers(config.probe_layers),
                pooling=config.probe_pooling,
                groups=groups,
                seed=args.seed,
                store=store,
            )
    else:
        probe = Probe.from_pretrained(str(saved), model=model, tokenizer=tokenizer)
    weights = replace(probe, model=None, tokenizer=None)
    fitted = weights if fits else None
    if online:
        return Critic(dataset=dataset, probe=weights, fitted=fitted)
    maker = {"scorer": probe.identity(), "model": fingerprint(model_name, revision), "dtype": dtype}
    found, notes = scored(
        dataset,
        local(probe.score_many),
        store,
        maker=maker,
        scorer=probe.identity(),
        config=config,
        signal="probe",
        progress=progress,
    )
    return Critic(dataset=found, fitted=fitted, notes=notes)


def _layers(text: str) -> Any:
    return text if text in ("all", "auto") else [int(part) for part in text.split(",")]


def _prompts(config: TrainConfig, model_name: str) -> tuple[list[Prompt], list[bool], list[str] | None]:
    """The prompts a probe is fitted on, whether they are harmful, and the file each is from.

    Errors: ValueError that names the file and row.
    """
    if config.probe == "world":
        if Path(model_name).parent != world.ASSETS:
            raise ValueError("probe world is fitted on the embedded world's prompts; name a model of that world")
        prompts, labels = world_data.probe_data(size=1000)
        return list(prompts), labels, None
    found: list[tuple[Prompt, bool, str]] = []
    for harmful, files in ((True, config.probe_harmful), (False, config.probe_harmless)):
        for name in files:
            found += [(prompt, harmful, name) for prompt in prompts_of(name)]
    return [p for p, _, _ in found], [label for _, label, _ in found], [name for _, _, name in found]


def prompts_of(name: str) -> Iterator[Prompt]:
    """The prompts of a file: `prompt` (a string, or messages), or `messages` up to the last answer.

    Errors: ValueError that names the file and row.
    """
    for index, row in enumerate(open_source(name).rows()):
        prompt = row.get("prompt")
        if prompt is None and row.get("messages"):
            messages = row["messages"]
            prompt = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        if not prompt:
            raise ValueError(f"{name}: row {index} has no `prompt` and no `messages`")
        yield prompt


def scored(
    dataset: Dataset,
    engine: Engine,
    store: Store,
    *,
    maker: Mapping[str, Any],
    scorer: Mapping[str, Any],
    config: TrainConfig,
    signal: str,
    progress: Progress,
) -> tuple[Dataset, dict[str, Any]]:
    """The dataset with a `safety` column, each different conversation scored once and kept; and counts for the record.

    Rows without a score end it with their count, or are left out with `on_error` drop.
    Errors: ValueError in one sentence.
    """
    state = PartialState()
    with state.main_process_first():
        outcome = fill(
            lambda: iter(dataset),
            engine if state.is_main_process else _nobody,
            store,
            maker=maker,
            keep_failures=True,
            progress=lambda done: progress(done, len(dataset)),
        )
    rows = scored_rows(lambda: iter(dataset), store, maker=maker, scorer=scorer, outcome=outcome, signal=signal)
    column = [row["safety"] for row in rows]
    kept = [index for index, safety in enumerate(column) if safety["p_safe"] is not None]
    counts = f"{outcome.failed} of {len(dataset)} rows got no score (first: {outcome.first_failure})"
    if outcome.failed and (config.on_error == "stop" or not kept):
        raise ValueError(f"{counts}; the others are kept in {store.path}, so run it again, or give --on_error drop")
    if outcome.failed:
        logger.warning("%s and are left out", counts)
    plain = dataset.remove_columns("safety") if "safety" in dataset.column_names else dataset
    # Without its reason, which is null in every row that is kept, and a type that tables can hold.
    found = plain.select(kept).add_column("safety", [column[index] for index in kept])
    notes = {"rows": len(dataset), "scored": outcome.scored, "reused": outcome.reused, "left_out": outcome.failed}
    return found, notes


def _nobody(items: Iterable[Item]) -> Iterator[tuple[str, Score]]:
    """The engine of the other processes: what the main one did not put into the store has no score."""
    for key, _ in items:
        yield key, Score(signal="none", p_safe=None, scorer={}, error="the main process got no score for it")


def write_probe(critic: Critic, output_dir: str) -> None:
    """Keep a probe that was fitted for this run in its output folder, for a resumed run and for others."""
    if critic.fitted is not None and PartialState().is_main_process:
        critic.fitted.save_pretrained(Path(output_dir) / "probe")


def results(metrics: Mapping[str, Any], log: list[dict[str, Any]], critic: Critic) -> str:
    """The content of `train_results.json`."""
    return json.dumps({"metrics": metrics, "log": log, "critic": critic.counted()}, indent=1) + "\n"
