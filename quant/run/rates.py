"""Rates of this machine, from a fraction of a second of work: what a plan's seconds come from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.names import FULL_BITS, LEVEL_GRIDS, SUPER_GRIDS
from quant.core.types import QuantSpec
from quant.run.config import RunConfig
from quant.solvers import declaration_of, get_solver, with_defaults

LAYERS = ((16, 1024), (320, 1024))  # out, in, of those that a solver is timed on
COPIED = 1 << 26  # bytes, beyond what caches hold


class Rates(NamedTuple):
    """Of this machine: flop/s of matrix products in the arithmetic's dtype, and in float32; bytes read and written a second
    where nothing but memory counts."""

    products: float
    float32: float
    copied: float = math.inf


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured, in a fraction of a second."""
    size = 2048 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    half, large = a.to(dtype), torch.zeros(COPIED, dtype=torch.uint8, device=device)
    other = torch.zeros_like(large)
    products, float32 = (2 * size**3 / _seconds(work, device) for work in (lambda: half @ half, lambda: a @ a))
    return Rates(products, float32, 2 * COPIED / _seconds(lambda: other.copy_(large), device))


class SolverCost(NamedTuple):
    """A solver takes the seconds of its products, and plane·in² + out·(line·in + square·in²) besides. products: flops for (out,
    in); each takes ``product`` seconds."""

    products: Callable[[int, int], float] = lambda n_out, n_in: 0.0
    product: float = 0.0
    plane: float = 0.0
    line: float = 0.0
    square: float = 0.0

    def seconds(self, n_out: int, n_in: int) -> float:
        """For one linear."""
        beside = self.plane * n_in**2 + n_out * (self.line * n_in + self.square * n_in**2)
        return self.product * self.products(n_out, n_in) + beside


def solver_cost(device: torch.device, run: RunConfig, rates: Rates) -> SolverCost:
    """What the solver takes on this machine: the products that it declares, at the rate of float32, or at its own where it is above
    that, and what two small LAYERS took besides. Where it declares none, all beside grows with the square of the inputs."""
    if run.wbits == FULL_BITS:
        return SolverCost()
    declared, options = declaration_of(run.solver).flops, with_defaults(run.solver, run.options)
    (few, _), (many, n_in) = LAYERS
    less, more = (_solving(device, run, *layer) for layer in LAYERS)

    def products(n_out: int, n_in: int) -> float:
        return declared(n_out, n_in, options)

    product = 1 / rates.float32
    if (floor := products(many, n_in) * product) > more:
        product *= more / floor
    row = max(0.0, more - less - product * (products(many, n_in) - products(few, n_in))) / (many - few)
    plane = max(0.0, more - many * row - product * products(many, n_in)) / n_in**2
    if floor > 0:
        return SolverCost(products, product, plane, row / n_in)
    return SolverCost(plane=plane, square=row / n_in**2)


def _solving(device: torch.device, run: RunConfig, n_out: int, n_in: int) -> float:
    """Seconds for a random layer."""
    own = run.grid_kind in (*SUPER_GRIDS, *LEVEL_GRIDS) or (run.group_size > 0 and n_in % run.group_size == 0)
    group = run.group_size if own else -1
    spec = QuantSpec(run.wbits, group, run.symmetric, run.range, run.levels, run.grid_kind)
    stats = GramStats(n_in, device)
    x = torch.randn(2 * n_in, n_in, device=device)
    stats.update(x, x)
    weight = torch.randn(n_out, n_in, device=device)
    work = partial(get_solver(run.solver), weight, stats, spec, **run.options)
    return _seconds(work, device, repeats=1)


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Best of a few runs, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        result = work()
        if isinstance(result, Tensor):
            result.flatten()[0].item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
