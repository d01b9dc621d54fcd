"""The activation probe: how risky is a request, read from the frozen reference before any token is generated.

Logistic regression on hidden states of the prompt. Shape suffixes: B prompts, F features.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeshape.data import Message
from safeshape.models import load
from safeshape.types import Score

Pooling = Literal["last", "mean"]
Prompt = str | Sequence[Message]  # a plain request, or a conversation that ends before the answer
Features = NDArray[np.float32]


def features(
    prompts: Sequence[Prompt],
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    pooling: Pooling = "last",
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Hidden states of prompts, the chosen layers side by side, shape (B, layers * hidden size).

    A prompt is rendered with the generation prompt, so that its last token is the one from which the first answer token
    is predicted. Layer 0 is the embedding, -1 the last layer.
    Errors: ValueError for a layer the model does not have, an unknown pooling, or no prompts.
    """
    depth = int(model.config.num_hidden_layers) + 1
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"the model has hidden states 0 to {depth - 1}; there is no layer {layer}")
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling must be last or mean, got {pooling!r}")
    if not prompts:
        raise ValueError("there are no prompts")
    shown = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in shown]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found = np.zeros((len(ids), len(layers) * int(model.config.hidden_size)), dtype=np.float32)
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            width = max(len(ids[row]) for row in rows)
            padded = torch.tensor([ids[row] + [0] * (width - len(ids[row])) for row in rows], device=model.device)
            lengths = torch.tensor([len(ids[row]) for row in rows], device=model.device)
            mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
            states = model.get_decoder()(
                input_ids=padded, attention_mask=mask, use_cache=False, output_hidden_states=True
            ).hidden_states
            for place, row in enumerate(rows):
                one = [pooled(states[layer][place, : len(ids[row])], pooling) for layer in layers]
                found[row] = torch.cat(one).float().cpu().numpy()
            progress(min(begin + batch_size, len(order)), len(order))
    return found


def pooled(states_LH: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector (H,) for the hidden states of a prompt: its last token's, or the mean over its tokens."""
    return states_LH[-1] if pooling == "last" else states_LH.mean(0)


def _loaded(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(model, str):
        return load(model)
    if tokenizer is None:
        raise ValueError("a loaded model needs its tokenizer")
    return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted probe and, unless only its weights were loaded, the model it reads.

    `weight_F`, `bias`: on raw features, standardisation folded in. `model_name`: the model it was fitted on.
    """

    weight_F: Features
    bias: float
    layers: tuple[int, ...]
    pooling: Pooling
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    model_name: str

    @classmethod
    def fit(
        cls,
        prompts: Sequence[Prompt],
        labels: Sequence[bool],
        *,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layers: Sequence[int] = (-1,),
        pooling: Pooling = "last",
    ) -> "Probe":
        """Fit on prompts labelled True where harmful. `model`: a path or Hub id, or a model with its tokenizer.

        Errors: ValueError when prompts and labels differ in number, only one class is there, or a loaded model comes
        without its tokenizer.
        Source: adaptive regularisation, arXiv 2602.17546 (last input token, logistic regression).
        Differs: the released code fits a two-layer network on means over all tokens and layers, and gates at 0.5.
        """
        if len(prompts) != len(labels):
            raise ValueError(f"{len(prompts)} prompts but {len(labels)} labels")
        if len(set(labels)) != 2:
            raise ValueError("a probe needs harmful and harmless prompts")
        reader, tokenizer = _loaded(model, tokenizer)
        x_BF = features(prompts, model=reader, tokenizer=tokenizer, layers=layers, pooling=pooling)
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        pipeline.fit(x_BF, np.asarray(labels, dtype=int))
        scaler, regression = pipeline[0], pipeline[1]
        weight_F = (regression.coef_[0] / scaler.scale_).astype(np.float32)
        bias = float(regression.intercept_[0] - (regression.coef_[0] * scaler.mean_ / scaler.scale_).sum())
        return cls(
            weight_F=weight_F,
            bias=bias,
            layers=tuple(layers),
            pooling=pooling,
            model=reader,
            tokenizer=tokenizer,
            model_name=str(reader.config._name_or_path),
        )

    def p_safe(self, prompts: Sequence[Prompt]) -> list[float]:
        """1 minus the probability that a prompt is harmful, in the order of the prompts.

        Errors: ValueError for a probe that was loaded without its model.
        """
        if self.model is None or self.tokenizer is None:
            raise ValueError("this probe was loaded without its model; it scores in training only")
        x_BF = features(prompts, model=self.model, tokenizer=self.tokenizer, layers=self.layers, pooling=self.pooling)
        return [float(value) for value in self.p_safe_of(torch.from_numpy(x_BF))]

    def p_safe_of(self, x_BF: torch.Tensor) -> torch.Tensor:
        """1 minus the probability of harm for features (B, F)."""
        return torch.sigmoid(-(x_BF @ torch.from_numpy(self.weight_F).to(x_BF) + self.bias))

    def score_many(self, conversations: Iterable[Sequence[Message]], *, window: int = 256) -> Iterator[Score]:
        """Score a stream of conversations by their prompts: all messages but the last."""
        buffer: list[Prompt] = []
        for messages in conversations:
            buffer.append(messages[:-1])
            if len(buffer) == window:
                yield from self._scores(buffer)
                buffer = []
        if buffer:
            yield from self._scores(buffer)

    def _scores(self, prompts: Sequence[Prompt]) -> Iterator[Score]:
        for value in self.p_safe(prompts):
            yield Score(signal="probe", p_safe=value, scorer=self.identity())

    def identity(self) -> dict[str, Any]:
        """What made a score."""
        return {"model": self.model_name, "layers": list(self.layers), "pooling": self.pooling}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `probe.safetensors` and `probe.json`; the model itself is not saved."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({"weight_F": self.weight_F, "bias": np.array([self.bias])}, path / "probe.safetensors")
        (path / "probe.json").write_text(json.dumps(self.identity(), indent=2) + "\n")

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

        Errors: ValueError when the model's size does not fit, or a loaded model comes without its tokenizer.
        """
        path = Path(folder)
        settings = json.loads((path / "probe.json").read_text())
        tensors = load_file(path / "probe.safetensors")
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
        )
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
