"""The activation probe: how risky is a request, read from the frozen reference before any token is generated.

Logistic regression on hidden states of the prompt. Shape suffixes: B prompts, D layers, F features.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message
from safeshape.signals.probes.choosing import Bank, Choice, Fitted, choose
from safeshape.signals.probes.features import LAYER_POOLINGS, Features, LayerPooling, Progress, extract
from safeshape.signals.probes.fitting import C_GRID, fit_linear
from safeshape.signals.probes.reading import (
    POOLINGS,
    Pooling,
    Prompt,
    Reader,
    load_model,
    open_reader,
    rendered,
    verify,
)
from safeshape.store import Store, content_key
from safeshape.types import Score

Layers = Sequence[int] | Literal["all", "auto"]
WINDOW = 256  # prompts scored together: their features are the most that scoring holds


def _loaded(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(model, str):
        return load_model(model)
    if tokenizer is None:
        raise ValueError("a loaded model needs its tokenizer")
    return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted probe and, unless only its weights were loaded, the model it reads.

    `weight_F`, `bias`: on raw features, the chosen layers side by side; standardisation, pooling of the layers and
    calibration are folded in. `model_name`: the model it was fitted on. `card`: what it was fitted on and how well.
    """

    weight_F: Features
    bias: float
    layers: tuple[int, ...]
    pooling: Pooling
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    model_name: str
    layer_pooling: LayerPooling = "concat"
    card: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        prompts: Sequence[Prompt],
        labels: Sequence[bool],
        *,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layers: Layers = (-1,),
        pooling: Pooling | Literal["auto"] = "last",
        layer_pooling: LayerPooling = "concat",
        groups: Sequence[str] | None = None,
        C: float | None = None,
        calibrate: bool = True,
        seed: int = 0,
        batch_size: int = 64,
        store: Store | None = None,
        progress: Progress = lambda done, total: None,
    ) -> "Probe":
        """Fit on prompts labelled True where harmful. `model`: a path or Hub id, or a model with its tokenizer.

        `groups`: where each prompt comes from (data set, kind, category); whole groups are then held out wherever
        something is chosen or calibrated. `layers`: numbers, "all", or "auto": chosen with the pooling by what held-out
        groups say (see `choosing`). `C`: None for cross-validation, or a number, which also leaves out calibration
        where `calibrate` is False. `layer_pooling`: concat, mean, or learned softmax weights.
        Errors: ValueError when prompts and labels differ in number, only one class is there, or a loaded model comes
        without its tokenizer.
        Source: adaptive regularisation, arXiv 2602.17546 (last input token, logistic regression).
        Differs: the released code fits a two-layer network on means over all tokens and layers, keeps its gradients
        from step to step, chooses the epoch on the test split, and gates at 0.5.
        """
        _check(prompts, labels, groups, layers, pooling, layer_pooling, C)
        given, tokenizer = _loaded(model, tokenizer)
        reader = open_reader(given, tokenizer)
        verify(reader)
        places = tuple(range(reader.depth)) if isinstance(layers, str) else tuple(reader.place(n) for n in layers)
        auto = layers == "auto"
        fixed_mean = layer_pooling == "mean" and not auto and pooling != "auto" and len(places) > 1
        poolings: tuple[Pooling, ...] = POOLINGS if pooling == "auto" else (pooling,)
        states = extract(
            prompts,
            reader,
            layers=places,
            poolings=poolings,
            mean_layers=fixed_mean,
            batch_size=batch_size,
            store=store,
            progress=progress,
        )
        bank = Bank(states_BPDH=states, poolings=poolings, places=(0,) if fixed_mean else places)
        options = [Choice(pooling=p, layers=bank.places, layer_pooling=layer_pooling) for p in poolings]
        fitted = _fitted(bank, np.array(labels), groups, None if auto else options, C, calibrate, seed)
        weight_F, chosen = fitted.linear.weight_F, fitted.choice
        if fixed_mean:
            weight_F = np.tile(weight_F / np.float32(len(places)), len(places))
        numbers = chosen.layers if layers == "auto" else places if isinstance(layers, str) else tuple(layers)
        return cls(
            weight_F=weight_F,
            bias=fitted.linear.bias,
            layers=numbers,
            pooling=chosen.pooling,
            model=given,
            tokenizer=tokenizer,
            model_name=str(given.config._name_or_path),
            layer_pooling=chosen.layer_pooling,
            card=_card(fitted, prompts, labels, groups, seed, reader),
        )

    def p_safe(self, prompts: Sequence[Prompt], *, batch_size: int = 64) -> list[float]:
        """1 minus the probability that a prompt is harmful, in the order of the prompts.

        Errors: ValueError for a probe that was loaded without its model.
        """
        if self.model is None or self.tokenizer is None:
            raise ValueError("this probe was loaded without its model; it scores in training only")
        if not prompts:
            raise ValueError("there are no prompts")
        reader, found = open_reader(self.model, self.tokenizer), []
        for begin in range(0, len(prompts), WINDOW):
            few = prompts[begin : begin + WINDOW]
            x = extract(few, reader, layers=self.layers, poolings=(self.pooling,), batch_size=batch_size)
            found += self.p_safe_of(torch.from_numpy(x.reshape(len(few), -1))).tolist()
        return [float(value) for value in found]

    def p_safe_of(self, x_BF: torch.Tensor) -> torch.Tensor:
        """1 minus the probability of harm for features (B, F)."""
        return torch.sigmoid(-(x_BF @ torch.from_numpy(self.weight_F).to(x_BF) + self.bias))

    def score_many(
        self, conversations: Iterable[Sequence[Message]], *, window: int = WINDOW, batch_size: int = 64
    ) -> Iterator[Score]:
        """Score a stream of conversations by their prompts: all messages but the last."""
        buffer: list[Prompt] = []
        for messages in conversations:
            buffer.append(messages[:-1])
            if len(buffer) == window:
                yield from self._scores(buffer, batch_size)
                buffer = []
        if buffer:
            yield from self._scores(buffer, batch_size)

    def _scores(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Score]:
        scorer = self.identity()
        for value in self.p_safe(prompts, batch_size=batch_size):
            yield Score(signal="probe", p_safe=value, scorer=scorer)

    def identity(self) -> dict[str, Any]:
        """What made a score."""
        settings = {"layers": list(self.layers), "pooling": self.pooling, "layer_pooling": self.layer_pooling}
        return {"model": self.model_name, **settings, "sha256": self.fingerprint()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `probe.safetensors` and `probe.json` (identity and card); the model itself is not saved."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({"weight_F": self.weight_F, "bias": np.array([self.bias])}, path / "probe.safetensors")
        (path / "probe.json").write_text(json.dumps({**self.identity(), "card": dict(self.card)}, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        model: str | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights_only: bool = False,
    ) -> "Probe":
        """Load a probe and, unless given or `weights_only`, the model it was fitted on.

        Errors: ValueError when there is no probe, its two files do not belong together, the model's size does not fit,
        or a loaded model comes without its tokenizer.
        """
        path = Path(folder)
        try:
            settings = json.loads((path / "probe.json").read_text())
            tensors = load_file(path / "probe.safetensors")
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no probe: there is no {Path(str(error.filename)).name}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path / 'probe.json'} is not valid JSON: {error}") from error
        reader: PreTrainedModel | None = None
        if not weights_only:
            reader, tokenizer = _loaded(settings["model"] if model is None else model, tokenizer)
        probe = cls(
            weight_F=tensors["weight_F"],
            bias=float(tensors["bias"][0]),
            layers=tuple(settings["layers"]),
            pooling=settings["pooling"],
            model=reader,
            tokenizer=tokenizer,
            model_name=settings["model"] if reader is None else str(reader.config._name_or_path),
            layer_pooling=settings.get("layer_pooling", "concat"),  # probes saved before there were others
            card=settings.get("card", {}),
        )
        if "sha256" in settings and settings["sha256"] != probe.fingerprint():
            raise ValueError(f"{path}: probe.json and probe.safetensors do not belong together")
        if reader is not None:
            probe.check_fits(reader)
        return probe

    def check_fits(self, model: PreTrainedModel) -> None:
        """Errors: ValueError when a model gives another number of features than the probe has weights."""
        wanted = len(self.layers) * int(model.config.get_text_config().hidden_size)
        if len(self.weight_F) != wanted:
            raise ValueError(f"the probe has {len(self.weight_F)} weights, this model gives {wanted} features")

    def fingerprint(self) -> str:
        """SHA-256 over what decides its scores but the model."""
        settings = json.dumps([self.layers, self.pooling, self.bias])
        return hashlib.sha256(settings.encode() + np.ascontiguousarray(self.weight_F).tobytes()).hexdigest()


def _check(
    prompts: Sequence[Prompt],
    labels: Sequence[bool],
    groups: Sequence[str] | None,
    layers: Layers,
    pooling: str,
    layer_pooling: str,
    C: float | None,
) -> None:
    if len(prompts) != len(labels):
        raise ValueError(f"{len(prompts)} prompts but {len(labels)} labels")
    if len(set(labels)) != 2:
        raise ValueError("a probe needs harmful and harmless prompts")
    if groups is not None and len(groups) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(groups)} groups")
    if isinstance(layers, str) and layers not in ("all", "auto"):
        raise ValueError(f"layers must be numbers, all or auto, got {layers!r}")
    if layers == "auto" and groups is None:
        raise ValueError("layers auto needs groups: what is good on known kinds of prompts does not tell the layer")
    if pooling not in (*POOLINGS, "auto"):
        raise ValueError(f"pooling must be last, mean or auto, got {pooling!r}")
    if layer_pooling not in LAYER_POOLINGS:
        raise ValueError(f"layer_pooling must be one of {', '.join(LAYER_POOLINGS)}, got {layer_pooling!r}")
    if C is not None and not C > 0:
        raise ValueError(f"C must be above 0, got {C}")


def _fitted(
    bank: Bank,
    labels: np.ndarray[Any, np.dtype[np.bool_]],
    groups: Sequence[str] | None,
    options: Sequence[Choice] | None,
    C: float | None,
    calibrate: bool,
    seed: int,
) -> Fitted:
    """By cross-validation; or with everything given and no calibration, fitted once."""
    if C is not None and not calibrate and options is not None and len(options) == 1:
        choice = options[0]
        x_BF, layers = bank.take(choice), len(choice.layers)
        linear = fit_linear(x_BF, labels, C=C, layer_pooling=choice.layer_pooling, layers=layers, seed=seed)
        return Fitted(choice=choice, linear=linear, C=C, scale=1.0, oof_logits=None, report={})
    grid = C_GRID if C is None else (C,)
    return choose(bank, labels, groups, options=options, grid=grid, calibrate=calibrate, seed=seed)


def _card(
    fitted: Fitted,
    prompts: Sequence[Prompt],
    labels: Sequence[bool],
    groups: Sequence[str] | None,
    seed: int,
    reader: Reader,
) -> dict[str, Any]:
    """What a probe was fitted on, and how it did on what was left out."""
    read = [[rendered(prompt, reader.tokenizer), bool(label)] for prompt, label in zip(prompts, labels, strict=True)]
    names = None if groups is None else dict(sorted(Counter(groups).items()))
    return {
        "harmful": int(sum(map(bool, labels))),
        "harmless": len(labels) - int(sum(map(bool, labels))),
        "groups": names,
        "data_sha256": content_key(read, "probe data"),
        "read_as": "chat template with generation prompt" if reader.chat else "plain text with special tokens",
        "C": fitted.C,
        "calibration_scale": fitted.scale,
        "learned_layer_weights": fitted.linear.layer_weights,
        "seed": seed,
        "cross_validation": fitted.report,
    }
