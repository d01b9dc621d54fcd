"""`safeshape probe score`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshape.config import ProbeScoreConfig, parse

if TYPE_CHECKING:
    from safeshape.signals.probes import Probe


def main(argv: Sequence[str]) -> str:
    """Score a dataset's requests with a probe and write it. Errors: ValueError in one sentence."""
    config = parse(ProbeScoreConfig, "probe score", argv)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output {output} exists already")
    from safeshape.signals.column import fill, scored_rows
    from safeshape.signals.engines import local
    from safeshape.signals.probes.reading import weights_sha256
    from safeshape.signals.scorers import one_by_one
    from safeshape.sources import open_source, write_rows
    from safeshape.store import Store
    from safeshape.types import Score
    from safeshape.verbs.bars import bars
    from safeshape.verbs.score import output_schema

    source = open_source(config.dataset_name, config.dataset_split)
    probe = opened(config)
    scorer = probe.identity()
    weights = "" if probe.model is None else weights_sha256(probe.model)
    fitted_on = probe.card.get("model_sha256")
    if fitted_on is not None and fitted_on != weights:
        raise ValueError(f"{probe.model_name} is not the model that the probe was fitted on: its weights differ")
    # The weights instead of the path: a moved folder is still the same model.
    maker = {"scorer": {**scorer, "model": weights}, "dtype": config.dtype}

    def score(conversations: Iterable[Sequence[Any]]) -> Iterator[Score]:
        return probe.score_many(conversations, batch_size=config.batch_size)

    store_path = config.store or f"{output}.store.sqlite"
    output.parent.mkdir(parents=True, exist_ok=True)
    with Store(store_path) as store, bars() as progress:
        outcome = fill(
            source.rows,
            local(one_by_one(score, scorer), block=256),
            store,
            maker=maker,
            keep_failures=config.on_error == "keep",
            progress=lambda done: progress("scored", done, source.count),
        )
        rows = scored_rows(source.rows, store, maker=maker, scorer=scorer, outcome=outcome, signal="probe")
        write_rows(output, rows, None if output.suffix == ".jsonl" else output_schema(source, scorer))
    lines = [
        f"scored {outcome.rows - outcome.failed} rows ({outcome.scored} now, {outcome.reused} from the store), "
        f"{outcome.unsafe} with p_safe below 0.5; wrote {output}"
    ]
    if outcome.failed:
        noun = "row" if outcome.failed == 1 else "rows"
        lines.append(f"{outcome.failed} {noun} failed (first: {outcome.first_failure})")
    return "\n".join([*lines, f"The scores are kept in {store_path}."])


def opened(config: ProbeScoreConfig) -> "Probe":
    """The probe with its model on the wanted device."""
    from safeshape.signals.probes import Probe, load_model
    from safeshape.sources import model_path

    alone = Probe.from_pretrained(config.probe, weights_only=True)
    name = alone.model_name if config.model is None else model_path(config.model)
    model, tokenizer = load_model(name, revision=config.revision, dtype=config.dtype, device=config.device)
    alone.check_fits(model)
    return replace(alone, model=model, tokenizer=tokenizer, model_name=name)
