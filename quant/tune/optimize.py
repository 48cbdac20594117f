"""Adam on what is tuned: batches by a seed, the best iterate on windows that are held out, and a state to go on from.

Every number here depends on the step alone, so that a run that goes on from a state ends with the bits of one that was
never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.tune.codes import Parameters
from quant.tune.config import Tuning

BETAS, EPSILON = (0.9, 0.999), 1e-12  # squared gradients of large models are far below Adam's usual 1e-8
WARM_UP = 0.02  # share of the steps over which the rate rises
VALIDATIONS = 20  # of a run, besides the one of the start
log = logging.getLogger(__name__)
Progress = Callable[[int, int, float, float], None]  # step, steps, held-out loss now, at the start


@dataclass(frozen=True)
class Objective:
    """What is minimized. loss: of a batch, by its number, a scalar with gradients; held_out: the mean loss of the batches
    that are not trained on; both of effective parameters as they are deployed. batches: numbers of those trained on."""

    loss: Callable[[Parameters, int], Tensor]
    held_out: Callable[[Parameters], float]
    batches: Sequence[int]


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


def rate_at(step: int, steps: int) -> float:
    """Share of the rate at a step: a linear rise over WARM_UP of the steps, then a cosine to 0."""
    return min((step + 1) / max(1.0, WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def order_of(batches: Sequence[int], step: int, seed: int) -> int:
    """The batch of a step: every batch once an epoch, in an order that seed and epoch decide."""
    epoch, place = divmod(step, len(batches))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return batches[int(order[place])]


def begin(objective: Objective, parameters: Parameters) -> State:
    """The state of a run that has not taken a step. Raises InputError where the loss is not finite there."""
    start = objective.held_out(parameters)
    if not math.isfinite(start):
        raise InputError("--tune: the loss of the solved model is not finite; use --dtype float32")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    moments = {name: tensor.clone() for name, tensor in zeros.items()}
    return State(0, parameters, zeros, moments, _copy(parameters), [start], start)


def optimize(
    objective: Objective,
    state: State,
    rates: Mapping[str, float],
    tuning: Tuning,
    seed: int,
    keep: Callable[[State], None] = lambda state: None,
    progress: Progress = lambda step, steps, now, first: None,
) -> State:
    """Take the steps that are left; the state then holds the iterate with the lowest held-out loss, which may be the start.

    keep: is given the state after every validation. A loss that is not finite ends the run at the best iterate.
    """
    steps = tuning.steps
    every = max(1, steps // VALIDATIONS)
    for parameter in state.parameters.values():
        parameter.requires_grad_()
    while not state.is_finished(steps):
        objective.loss(state.parameters, order_of(objective.batches, state.step, seed)).backward()
        _adam(state, rates, rate_at(state.step, steps))
        state.step += 1
        if state.step % every and state.step < steps:
            continue
        with torch.no_grad():
            now = objective.held_out(state.parameters)
        state.losses.append(now)
        if now < state.lowest:
            state.lowest, state.best_step, state.best = now, state.step, _copy(state.parameters)
        if not math.isfinite(now):
            log.warning("tuning: the loss is not finite after step %d; the best iterate stays", state.step)
        keep(state)
        progress(state.step, steps, now, state.losses[0])
    return state


@torch.no_grad()
def _adam(state: State, rates: Mapping[str, float], share: float) -> None:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1) in place; takes the gradients."""
    one, two = (1 - beta ** (state.step + 1) for beta in BETAS)
    for name, parameter in state.parameters.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        m = state.first[name].lerp_(gradient, 1 - BETAS[0])
        v = state.second[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        parameter.addcdiv_(m, (v / two).sqrt_().add_(EPSILON), value=-rates[name] * share / one)
        parameter.grad = None


def _copy(parameters: Parameters) -> Parameters:
    return {name: tensor.detach().clone() for name, tensor in parameters.items()}
