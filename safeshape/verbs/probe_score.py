"""`safeshape probe score`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safeshape.config import ProbeScoreConfig, parse
from safeshape.verbs.filling import check_output, scored_dataset

if TYPE_CHECKING:
    from safeshape.signals.probes import Probe


def main(argv: Sequence[str]) -> str:
    """Score a dataset's requests with a probe and write it. Errors: ValueError in one sentence."""
    config = parse(ProbeScoreConfig, "probe score", argv)
    check_output(config)
    from safeshape.signals.engines import local
    from safeshape.signals.probes.reading import weights_sha256
    from safeshape.signals.scorers import one_by_one
    from safeshape.sources import open_source
    from safeshape.types import Score

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

    engine = local(one_by_one(score, scorer), block=256)
    return "\n".join(scored_dataset(config, source, engine, maker=maker, scorer=scorer, signal="probe"))


def opened(config: ProbeScoreConfig) -> "Probe":
    """The probe with its model on the wanted device."""
    from safeshape.signals.probes import Probe, load_model
    from safeshape.sources import model_path

    alone = Probe.from_pretrained(config.probe, weights_only=True)
    name = alone.model_name if config.model is None else model_path(config.model)
    model, tokenizer = load_model(name, revision=config.revision, dtype=config.dtype, device=config.device)
    alone.check_fits(model)
    return replace(alone, model=model, tokenizer=tokenizer, model_name=name)
