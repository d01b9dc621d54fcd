"""Alignment under disturbance of the hidden states: Vaccine and T-Vaccine."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from safeshape.defences.freezing import layer_of
from safeshape.defences.records import Context, Defence, generator, whole_number, within
from safeshape.defences.stepping import Inputs, Loop, Stepper, gradients_of, token_mean

Hook = Callable[[str, torch.Tensor], torch.Tensor | None]
Errors = dict[tuple[int, str], torch.Tensor]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention of every layer, by name. Errors: ValueError for a model without any."""
    found = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Attention")}
    if not found:
        raise ValueError(f"{type(model).__name__} has no modules named ...Attention, which vaccine disturbs")
    return found


@contextmanager
def at_outputs(modules: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Call `hook(name, output)` for every module that runs; what it returns, if anything, replaces the output."""

    def forward_hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def run(module: nn.Module, given: Any, output: Any) -> Any:
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            other = hook(name, first)
            if other is None:
                return None
            return other if rest is None else (other, *rest)

        return run

    handles = [module.register_forward_hook(forward_hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Disturbed(Stepper):
    """Two passes: the gradient e at every attention output, then the loss with rho * e / ||e|| added there.

    ||e|| is over all layers and all micro-batches of the step, so splitting a batch changes nothing.
    """

    def __init__(self, *, rho: float) -> None:
        self.rho = rho
        self._modules: dict[str, nn.Module] = {}

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Find the attention modules."""
        self._modules = attention_modules(model)

    def modules(self) -> Mapping[str, nn.Module]:
        """Which of them are disturbed in this step."""
        return self._modules

    def errors(self, loop: Loop) -> Errors:
        """e of the first pass, by micro-batch and module."""
        found: Errors = {}
        running: list[int] = []

        def loss_of(model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
            running[:] = [id(inputs)]
            return token_mean(model, inputs, num_tokens)

        def watch(name: str, output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            key = (running[0], name)
            # Below the first adapter nothing is trained, so the output has no gradient unless it is asked for.
            watched = output if output.requires_grad else output.detach().requires_grad_()
            watched.register_hook(lambda gradient: found.__setitem__(key, gradient.detach().clone()))  # type: ignore[no-untyped-call]
            return watched

        with at_outputs(self.modules(), watch):
            gradients_of(loop, lambda: loop.user(loss_of))
        return found

    def gradients(self, loop: Loop) -> torch.Tensor:
        """The gradient of the disturbed loss."""
        errors = self.errors(loop)
        norm = torch.stack([error.float().square().sum() for error in errors.values()]).sum().sqrt()
        scale = self.rho / (norm + 1e-7)
        running: list[int] = []

        def loss_of(model: nn.Module, inputs: Inputs, num_tokens: torch.Tensor) -> torch.Tensor:
            running[:] = [id(inputs)]
            return token_mean(model, inputs, num_tokens)

        def disturb(name: str, output: torch.Tensor) -> torch.Tensor | None:
            error = errors.get((running[0], name))
            return None if error is None else output + (scale * error).to(output)

        with at_outputs(self.modules(), disturb):
            return loop.user(loss_of)


def drawn_layers(shares_L: torch.Tensor, count: int, seed: int) -> list[int]:
    """`count` different layers, drawn in proportion to their shares; zeros last."""
    picked = torch.multinomial(shares_L.double() + 1e-30, min(count, len(shares_L)), generator=generator(seed))
    return sorted(picked.tolist())


class SampledLayers(Disturbed):
    """Vaccine on a few layers, drawn in proportion to the norm of their gradient on harmful data.

    The others are not disturbed and not trained until the next draw. Shape suffix L: layers.
    """

    def __init__(self, *, rho: float, layers: int, every: int, probe_every: int, seed: int) -> None:
        super().__init__(rho=rho)
        self.layers, self.every, self.probe_every, self.seed = layers, every, probe_every, seed
        self.norms_L = torch.zeros(0)
        self.now: list[int] = []

    def start(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Count the layers."""
        super().start(model, parameters)
        numbers = [number for name in self._modules if (number := layer_of(name)) is not None]
        if not numbers:
            raise ValueError("t_vaccine finds no numbered layers in this model")
        self.norms_L = torch.zeros(max(numbers) + 1)

    def modules(self) -> Mapping[str, nn.Module]:
        """Those of the drawn layers."""
        return {name: module for name, module in self._modules.items() if layer_of(name) in self.now}

    def probe(self, loop: Loop) -> torch.Tensor:
        """The norm of each layer's gradient on harmful data, (L,)."""
        harmful, _ = gradients_of(loop, loop.harmful)
        squares_L = torch.zeros(len(self.norms_L))
        for name, gradient in harmful.items():
            number = layer_of(name)
            if number is not None:
                squares_L[number] += gradient.float().square().sum().cpu()
        return squares_L.sqrt()

    def gradients(self, loop: Loop) -> torch.Tensor:
        """Vaccine's gradient for the drawn layers; none for the rest."""
        if loop.step % self.probe_every == 0:
            self.norms_L = self.probe(loop)
        self.now = drawn_layers(self.norms_L, self.layers, self.seed * 1_000_003 + loop.step // self.every)
        loss = super().gradients(loop)
        for name, parameter in loop.parameters.items():
            if layer_of(name) not in self.now:
                parameter.grad = None
        return loss

    def state(self) -> dict[str, torch.Tensor]:
        """The norms of the last probe."""
        return {"norms": self.norms_L}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take them back."""
        self.norms_L = state["norms"].cpu()


def vaccine(*, rho: float = 2.0, learning_rate: float = 1e-3, epochs: float = 30) -> Defence:
    """Vaccine (NeurIPS 2024, arXiv 2402.01109, algorithm 1): alignment under the worst small embedding drift.

    `rho`: size of the disturbance. `learning_rate`, `epochs`: of the alignment run.
    """
    within("rho", rho, 0, float("inf"))
    within("learning_rate", learning_rate, 0, float("inf"))
    within("epochs", epochs, 0, float("inf"))
    return Defence(
        name="vaccine",
        stage="alignment",
        source="Vaccine, arXiv 2402.01109, algorithm 1",
        differs="hardens a model that is aligned already",
        needs=frozenset({"safe_data"}),
        stepper=lambda context: Disturbed(rho=rho),
        alignment={"learning_rate": learning_rate, "num_train_epochs": float(epochs)},
    )


def t_vaccine(
    *,
    rho: float = 2.0,
    layers: int = 8,
    every: int = 20,
    probe_every: int = 200,
    learning_rate: float = 1e-3,
    epochs: float = 20,
) -> Defence:
    """T-Vaccine (arXiv 2410.09760, algorithm 1): Vaccine on `layers` layers drawn by their harmful-gradient norm.

    A draw holds for `every` steps; the norms are measured anew every `probe_every`.
    """
    within("rho", rho, 0, float("inf"))
    within("learning_rate", learning_rate, 0, float("inf"))
    within("epochs", epochs, 0, float("inf"))
    for name, value in (("layers", layers), ("every", every), ("probe_every", probe_every)):
        whole_number(name, value)

    def stepper(context: Context) -> SampledLayers:
        return SampledLayers(rho=rho, layers=layers, every=every, probe_every=probe_every, seed=int(context.args.seed))

    return Defence(
        name="t_vaccine",
        stage="alignment",
        source="T-Vaccine, arXiv 2410.09760, algorithm 1",
        differs="the norms are those of one harmful batch; rho, learning rate and epochs have no default in its code",
        needs=frozenset({"safe_data", "harmful_data"}),
        stepper=stepper,
        alignment={"learning_rate": learning_rate, "num_train_epochs": float(epochs)},
    )
