"""Defences that weigh whole rows: Antibody by the model itself; BDS and SEAL by learning against safe data.

Shape suffixes: B rows of a micro-batch, M rows of an optimisation batch, R rows of the user's data.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from safeshape.data import Message, as_messages
from safeshape.defences.nested import trained_on
from safeshape.defences.records import Context, Defence, required, whole_number, within
from safeshape.defences.stepping import ROW, Inputs, Loop, Pass, Stepper, example_means, token_losses
from safeshape.models.loading import evaluation_mode
from safeshape.signals.antibody import GENERIC_REFUSAL, answer_nll, margins, refused
from safeshape.types import IGNORE


def rows_of(user: Pass) -> torch.Tensor:
    """The numbers of the batch's rows in the user's data, (M,)."""
    return torch.cat([inputs[ROW] for inputs in user.batches])


def as_pass(loop: Loop) -> Pass:
    """The user's batch with its rows at hand."""
    if not isinstance(loop.user, Pass):
        raise ValueError("this stepper needs the rows of the user's batch")
    return loop.user


class RefusalWeights(Stepper):
    """w = softmax over the batch of (NLL(refusal) - NLL(answer)) / tau; L = sum_i w_i sum_t CE / sum_i w_i N_i.

    The weights are of the weights as they are now, without gradient and without dropout.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, tau: float, refusal: str) -> None:
        self.tokenizer, self.tau, self.refusal = tokenizer, tau, refusal
        self._requests: dict[int, list[Message]] = {}

    def know(self, requests: Mapping[int, list[Message]]) -> None:
        """The conversations, by row number."""
        self._requests = dict(requests)

    def weights(self, user: Pass) -> torch.Tensor:
        """(M,), they sum to 1."""
        with evaluation_mode(user.model):
            answers_M = torch.cat(user.look(example_means))
            refusals_M = torch.cat(user.look(self._refusal_nll))
        return torch.softmax(margins(refusals_M, answers_M) / self.tau, dim=0)

    def _refusal_nll(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        conversations = [refused(self._requests[int(row)], self.refusal) for row in inputs[ROW]]
        return answer_nll(model, self.tokenizer, conversations)

    def gradients(self, loop: Loop) -> torch.Tensor:
        """The weighted loss of the whole batch."""
        user = as_pass(loop)
        weights_M, rows_M = self.weights(user), rows_of(user)
        weight_of = dict(zip(rows_M.tolist(), weights_M, strict=True))
        tokens_M = torch.cat([(inputs["labels"][:, 1:] != IGNORE).sum(-1) for inputs in user.batches])
        total = (weights_M * tokens_M).sum().clamp(min=1)

        def loss_of(model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
            ce_BT, _ = token_losses(model, inputs)
            weights_B = torch.stack([weight_of[int(row)] for row in inputs[ROW]])
            return (weights_B * ce_BT.sum(-1)).sum() / total

        return user(loss_of)


class Scheduler(Stepper):
    """Row weights w = R * softmax(omega), learned online beside the model.

    Model: share_safe * CE_safe + share_user * mean_i w_i l_i. Then omega: a step on mean_i w_i l_i with l fixed, so
    that rows the model does not learn beside the safe data lose weight. `l_i`: token mean of row i; `CE_safe`: the mean
    over rows of the safe data's.
    """

    def __init__(
        self, *, rows: int, learning_rate: float, first: float, safe_share: float | None, decay: float
    ) -> None:
        self.omega = nn.Parameter(torch.full((rows,), float(first)))
        self.optimizer = torch.optim.AdamW([self.omega], lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizer.zero_grad()
        self.safe_share, self.decay = safe_share, decay

    def row_weights(self) -> torch.Tensor:
        """R * softmax(omega), (R,): 1 on average."""
        return len(self.omega) * torch.softmax(self.omega, dim=0)

    def shares(self, epoch: int) -> tuple[float, float]:
        """What the safe and the user's loss are multiplied by: 1 and 1, or a share that falls with each epoch."""
        if self.safe_share is None:
            return 1.0, 1.0
        share = self.safe_share - self.decay * epoch
        return share, 1 - share

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put omega where the model is."""
        device = next(iter(parameters.values())).device
        self.omega.data = self.omega.data.to(device)

    def gradients(self, loop: Loop) -> torch.Tensor:
        """The model's gradient, then omega's own step on the losses of before the model's."""
        user, (safe_share, user_share) = as_pass(loop), self.shares(int(loop.epoch))
        weights_R, losses = self.row_weights().detach(), dict[int, torch.Tensor]()

        def weighted(model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
            losses_B = example_means(model, inputs)
            losses.update(zip(inputs[ROW].tolist(), losses_B.detach(), strict=True))
            return user_share * (weights_R[inputs[ROW]] * losses_B).sum() / user.examples

        def safe(model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
            # Its own count of rows: the user's last batch of an epoch may hold fewer.
            return safe_share * example_means(model, inputs).sum() / loop.drawn_rows

        loss = user(weighted) + loop.safe(safe)
        rows_M = rows_of(user)
        found = (self.row_weights()[rows_M] * torch.stack([losses[int(row)] for row in rows_M])).mean()
        found.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def state(self) -> dict[str, torch.Tensor]:
        """Omega and its optimizer's moments."""
        moments = self.optimizer.state.get(self.omega, {})
        return {"omega": self.omega.detach(), **{f"adam/{name}": torch.as_tensor(v) for name, v in moments.items()}}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take them back."""
        self.omega.data = state["omega"].clone()
        moments = {name.removeprefix("adam/"): v.clone() for name, v in state.items() if name.startswith("adam/")}
        if moments:
            moments["step"] = moments["step"].cpu()
            self.optimizer.state[self.omega] = moments


def bds(*, learning_rate: float = 5e-3, first: float = 0.1) -> Defence:
    """BDS, Bayesian Data Scheduler (NeurIPS 2025, arXiv 2510.27172): CE_safe + mean_i w_i l_i, w = R softmax(omega).

    `learning_rate`: of omega. `first`: where each omega begins.
    """
    within("learning_rate", learning_rate, 0, float("inf"))
    within("first", first, -1e6, 1e6)

    def stepper(context: Context) -> Scheduler:
        return Scheduler(rows=_rows(context), learning_rate=learning_rate, first=first, safe_share=None, decay=0.0)

    return Defence(
        name="bds",
        stage="fine-tuning",
        source="BDS, arXiv 2510.27172 (scalar scheduler)",
        differs=(
            "the safe batch has the size of the user's optimisation batch and omega moves once an update; the neural "
            "scheduler and the priors are left out"
        ),
        needs=frozenset({"safe_data"}),
        stepper=stepper,
    )


def _rows(context: Context) -> int:
    if context.user_rows is None:
        raise ValueError("the number of the user's rows is not known yet")
    return context.user_rows


def seal(
    *, keep: float = 0.8, learning_rate: float = 1e-2, epochs: int = 2, safe_share: float = 0.9, decay: float = 0.1
) -> Defence:
    """SEAL (ICLR 2025, arXiv 2410.07471, algorithm 2): learn which rows to keep, then fine-tune the start on them.

    A copy of the start learns u * CE_safe + (1 - u) * mean_i w_i l_i while w learns as in BDS; u is `safe_share`, less
    `decay` with each of `epochs`. The share `keep` of highest weight is what the user's model is then trained on.
    """
    within("keep", keep, 1e-9, 1)
    within("learning_rate", learning_rate, 0, float("inf"))
    whole_number("epochs", epochs)
    within("safe_share", safe_share, 0, 1)
    within("decay", decay, 0, safe_share / max(epochs - 1, 1))

    def prepare(dataset: Dataset, context: Context) -> Dataset:
        selector = Scheduler(
            rows=len(dataset), learning_rate=learning_rate, first=0.1, safe_share=safe_share, decay=decay
        )
        start = required(context.start, "start", "seal")
        settings = {"num_train_epochs": float(epochs), "max_steps": -1}
        chosen = Path(context.output_dir) / "seal_kept.json"
        if context.resume and chosen.is_file():
            return dataset.select(json.loads(chosen.read_text()))
        trained_on(start, dataset, context, "seal", stepper=selector, **settings)
        kept = best_rows(selector.omega.detach(), keep)
        chosen.parent.mkdir(parents=True, exist_ok=True)
        chosen.write_text(json.dumps(kept) + "\n")
        return dataset.select(kept)

    return Defence(
        name="seal",
        stage="fine-tuning",
        source="SEAL, arXiv 2410.07471, algorithm 2",
        differs="the selector learns at the run's own learning rate and batch size, with the trained weights' own kind",
        needs=frozenset({"safe_data"}),
        keeps_start="always",
        prepare=prepare,
    )


def best_rows(weights_R: torch.Tensor, keep: float) -> list[int]:
    """The numbers of the share of rows with the highest weights, in the order of the data; ties: earlier rows first."""
    count = max(1, math.floor(keep * len(weights_R) + 1e-9))
    return sorted(weights_R.argsort(descending=True, stable=True)[:count].tolist())


def antibody(*, tau: float = 1.0, refusal: str = GENERIC_REFUSAL) -> Defence:
    """Antibody's fine-tuning stage (ICLR 2026, arXiv 2603.00498): rows weighted by how far they are from a refusal.

    `tau`: temperature. `refusal`: the generic refusal that every request is paired with.
    """
    within("tau", tau, 1e-6, float("inf"))
    if not isinstance(refusal, str) or not refusal.strip():
        raise ValueError("refusal must be a text")
    return Defence(
        name="antibody",
        stage="fine-tuning",
        source="Antibody, arXiv 2603.00498",
        differs=(
            "only its fine-tuning stage, on a model without Antibody's own alignment stage; the softmax is over the "
            "optimisation batch, and the likelihoods behind it are taken without dropout"
        ),
        stepper=lambda context: _knowing(context, tau=tau, refusal=refusal),
    )


def _knowing(context: Context, *, tau: float, refusal: str) -> RefusalWeights:
    if context.user_data is None:
        raise ValueError("the user's rows are not known yet")
    stepper = RefusalWeights(context.tokenizer, tau=tau, refusal=refusal)
    stepper.know({index: as_messages(row) for index, row in enumerate(context.user_data)})
    return stepper
