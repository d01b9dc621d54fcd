"""`safeshape score antibody`."""

from collections.abc import Sequence

from safeshape.config import parse
from safeshape.config.score_antibody import AntibodyScoreConfig
from safeshape.verbs.filling import check_output, scored_dataset


def main(argv: Sequence[str]) -> str:
    """Score a dataset's answers against a refusal and write it. Errors: ValueError in one sentence."""
    config = parse(AntibodyScoreConfig, "score antibody", argv)
    check_output(config)
    from safeshape.models import load
    from safeshape.signals.antibody import AntibodySignal
    from safeshape.signals.engines import local
    from safeshape.signals.probes.reading import weights_sha256
    from safeshape.signals.scorers import one_by_one
    from safeshape.sources import model_path, open_source

    source = open_source(config.dataset_name, config.dataset_split)
    name = model_path(config.model_name_or_path)
    model, tokenizer = load(name, revision=config.revision, dtype=config.dtype)
    signal = AntibodySignal(
        model.to(config.device),
        tokenizer,
        refusal=config.refusal,
        tau=config.tau,
        batch_size=config.batch_size,
        model_name=name,
    )
    scorer = signal.identity()
    # The weights instead of the path: a moved folder is still the same model.
    maker = {"scorer": {**scorer, "model": weights_sha256(model)}, "dtype": config.dtype}
    engine = local(one_by_one(signal.score_many, scorer))
    return "\n".join(scored_dataset(config, source, engine, maker=maker, scorer=scorer, signal="antibody"))
