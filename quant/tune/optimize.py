"""Steps on what is tuned, of Adam or of the gradient's sign: batches by a seed, the best iterate on windows that are held out, and a state to go on from.

Every number here depends on the step alone, so that a run that goes on from a state ends with the bits of one that was
never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from quant.core.errors import InputError
from quant.tune.codes import Parameters
from quant.tune.config import Tuning
from quant.tune.moments import chance, halved

BETAS, EPSILON = (0.9, 0.999), 1e-12  # squared gradients of large models are far below Adam's usual 1e-8
WARM_UP = 0.02  # share of the steps over which the rate rises
LARGEST_SEED = 1 << 63
Bounds = Mapping[str, tuple[float, float]]
VALIDATIONS = 20  # of a run, besides the one of the start
log = logging.getLogger(__name__)
Progress = Callable[[int, int, float, float], None]  # step, steps, held-out loss now, at the start
Correct = Callable[[], Callable[[], None]]  # in front of a step; what it returns, behind it


def copied(parameters: Parameters) -> Parameters:
    """All of them, as they are."""
    return {name: tensor.detach().clone() for name, tensor in parameters.items()}


@dataclass(frozen=True)
class Objective:
    """What is minimized. loss: of a batch, by its number, a scalar with gradients; held_out: the mean loss of the batches
    that are not trained on; both of effective parameters as they are deployed. batches: numbers of those trained on.
    settle: what is kept of the best iterate."""

    loss: Callable[[Parameters, int], Tensor]
    held_out: Callable[[Parameters], float]
    batches: Sequence[int]
    settle: Callable[[Parameters], Parameters] = copied


@dataclass
class State:
    """Where a run stands. losses: held-out loss of the start and of every validation; lowest: of ``best``."""

    step: int
    parameters: Parameters
    first: Parameters  # Adam's moments
    second: Parameters
    best: Parameters
    losses: list[float]
    lowest: float
    best_step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, under names of a file."""
        parts = {"at": self.parameters, "m": self.first, "v": self.second, "best": self.best}
        return {f"{part}/{name}": tensor.detach() for part, own in parts.items() for name, tensor in own.items()}

    def numbers(self) -> dict[str, Any]:
        """All the rest, as JSON holds it exactly."""
        return {"step": self.step, "losses": self.losses, "lowest": self.lowest, "best_step": self.best_step}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> State:
        """The state that `tensors` and `numbers` gave."""
        parts: dict[str, Parameters] = {"at": {}, "m": {}, "v": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, own = name.partition("/")
            parts[part][own] = tensor
        return cls(numbers["step"], parts["at"], parts["m"], parts["v"], parts["best"], numbers["losses"],
                   numbers["lowest"], numbers["best_step"])  # fmt: skip

    def is_finished(self, steps: int) -> bool:
        """Whether no step is left, or none that could help."""
        return self.step >= steps or not math.isfinite(self.losses[-1])

    def record(self) -> dict[str, Any]:
        """What a journal says of it."""
        start = self.losses[0]
        return {"held_out_start": start, "held_out_end": self.lowest, "best_step": self.best_step, "steps": self.step,
                "losses": [loss if math.isfinite(loss) else None for loss in self.losses]}  # fmt: skip


def rate_at(step: int, steps: int, optimizer: str = "adam") -> float:
    """Share of the rate at a step: of Adam's a linear rise over WARM_UP of the steps, then a cosine to 0; of the sign's a
    line to 0, as AutoRound has it."""
    if optimizer == "sign":
        return 1 - step / steps
    return min((step + 1) / max(1.0, WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def order_of(batches: Sequence[int], step: int, seed: int) -> int:
    """The batch of a step: every batch once an epoch, in an order that seed and epoch decide."""
    epoch, place = divmod(step, len(batches))
    order = torch.randperm(
        len(batches), generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % LARGEST_SEED)
    )
    return batches[int(order[place])]


def begin(objective: Objective, parameters: Parameters, tuning: Tuning, what: str = "--tune") -> State:
    """The state of a run that has not taken a step; the sign has no moments. what: the flag that asks for it. Raises
    InputError where the loss is not finite there."""
    start = objective.held_out(parameters)
    if not math.isfinite(start):
        raise InputError(f"{what}: the loss of the quantized model is not finite at the start; use --dtype float32")
    kept = torch.bfloat16 if tuning.state == "half" else torch.float32
    first, second = (
        {name: torch.zeros_like(tensor, dtype=kept) for name, tensor in parameters.items()}
        if tuning.optimizer == "adam"
        else {}
        for _ in range(2)
    )
    return State(0, parameters, first, second, objective.settle(parameters), [start], start)


def optimize(
    objective: Objective,
    state: State,
    rates: Mapping[str, float],
    tuning: Tuning,
    seed: int,
    keep: Callable[[State], None] = lambda state: None,
    progress: Progress = lambda step, steps, now, first: None,
    bounds: Bounds = {},  # noqa: B006 (only read)
    correct: Correct = lambda: lambda: None,
) -> State:
    """Take the steps that are left; the state then holds the iterate with the lowest held-out loss, which may be the start.

    keep: is given the state after every validation. bounds: what parameters stay within, by name, of those that do.
    correct: may change what a step makes of the parameters, in place. A loss that is not finite ends the run at the best iterate.
    """
    steps = tuning.steps
    every = max(1, steps // VALIDATIONS)
    with _stepping(state, rates, tuning, seed, bounds):
        while not state.is_finished(steps):
            corrected = correct()
            objective.loss(state.parameters, order_of(objective.batches, state.step, seed)).backward()
            corrected()
            state.step += 1
            if state.step % every and state.step < steps:
                continue
            with torch.no_grad():
                now = objective.held_out(state.parameters)
            state.losses.append(now)
            if now < state.lowest:
                state.lowest, state.best_step, state.best = now, state.step, objective.settle(state.parameters)
            if not math.isfinite(now):
                log.warning("tuning: the loss is not finite after step %d; the best iterate stays", state.step)
            keep(state)
            progress(state.step, steps, now, state.losses[0])
    return state


@contextmanager
def _stepping(state: State, rates: Mapping[str, float], tuning: Tuning, seed: int, bounds: Bounds) -> Iterator[None]:
    """For the length of a `with`, every parameter takes its step as soon as its gradient is there and drops it: one gradient
    is held at a time. A parameter is used once a step, so that nothing behind it in the backward pass reads it again."""
    with ExitStack() as stack:
        for place, (name, parameter) in enumerate(sorted(state.parameters.items())):

            @torch.no_grad()
            def step(moved: Tensor, place: int = place, name: str = name) -> None:
                rate = rates[name] * rate_at(state.step, tuning.steps, tuning.optimizer)
                if tuning.optimizer == "sign":
                    _sign(moved, rate)
                else:
                    _adam(moved, state.first[name], state.second[name], state.step, rate, (seed, state.step, place))
                if name in bounds:
                    moved.clamp_(*bounds[name])
                moved.grad = None

            stack.callback(parameter.requires_grad_().register_post_accumulate_grad_hook(step).remove)
        yield


def _adam(
    parameter: Tensor, first: Tensor, second: Tensor, step: int, rate: float, drawn: tuple[int, int, int]
) -> None:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1) in place; moments in half precision are rounded by chance."""
    moments = [moment.float() for moment in (first, second)]
    steps = [torch.full((), float(step), device=parameter.device)]
    adam(
        [parameter], [parameter.grad], moments[:1], moments[1:], [], steps, fused=True, amsgrad=False, maximize=False,  # type: ignore[list-item]
        beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=0.0, eps=EPSILON,
    )  # fmt: skip
    if first.dtype != torch.float32:
        generator = chance(*drawn)
        first.copy_(halved(moments[0], generator))
        second.copy_(halved(moments[1], generator))


def _sign(parameter: Tensor, rate: float) -> None:
    """θ ← θ - rate · sign(g), in place (AutoRound, arXiv 2309.05516, equation 5)."""
    assert parameter.grad is not None
    parameter.add_(parameter.grad.sign_(), alpha=-rate)
