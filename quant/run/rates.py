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
from quant.solvers import get_solver

SAMPLES = (512, 1024)  # inputs of the two layers that a solver is timed on
SAMPLE_ROWS = 256
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


def solver_cost(device: torch.device, run: RunConfig) -> tuple[float, float]:
    """(a, b): the solver takes out·(a·in + b·in²) seconds on this machine."""
    if run.wbits == FULL_BITS:
        return 0.0, 0.0
    solver = get_solver(run.solver)
    group = run.group_size if run.grid_kind in (*SUPER_GRIDS, *LEVEL_GRIDS) else -1
    spec = QuantSpec(run.wbits, group, run.symmetric, run.range, run.levels, run.grid_kind)
    seconds = []
    for n_in in SAMPLES:
        stats = GramStats(n_in, device)
        x = torch.randn(2 * n_in, n_in, device=device)
        stats.update(x, x)
        weight = torch.randn(SAMPLE_ROWS, n_in, device=device)
        work = partial(solver, weight, stats, spec, **run.options)
        seconds.append(_seconds(work, device, repeats=1))
    (p, r), (t, u) = SAMPLES, (x / SAMPLE_ROWS for x in seconds)
    b = max(0.0, (u / r - t / p) / (r - p))
    return max(0.0, t / p - b * p), b


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
