"""The activation probe: reading prompts, fitting, choosing layers, measuring it beside its controls."""

from safeshape.signals.probes.features import Features, LayerPooling, extract, features
from safeshape.signals.probes.probe import Probe
from safeshape.signals.probes.reading import Pooling, Prompt, load_model, open_reader, pooled

__all__ = [
    "Features",
    "LayerPooling",
    "Pooling",
    "Probe",
    "Prompt",
    "extract",
    "features",
    "load_model",
    "open_reader",
    "pooled",
]
