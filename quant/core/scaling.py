"""Weights of any magnitude: outside [2^-40, 2^40] they are solved scaled by a power of two.

Solvers take squares and products of weights in float32, which overflow or vanish long before the weights do. They are
equivariant under powers of two, so the answer is that of the scaled weights, scaled back; inside the range nothing is
touched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from quant.core.gram import GramStats
from quant.core.types import FINEST, Grid, QuantizedWeight, QuantSpec

REACH = 40  # the squares of 2^±40, times what inputs give, lie well within float32


def exponent_outside(weight: Tensor) -> int:
    """The k of least magnitude for which weight · 2^-k has its largest entry in [2^-41, 2^40); 0 for zeros."""
    low, high = weight.detach().aminmax()
    _, exponent = math.frexp(max(-float(low), float(high)))
    return exponent - min(max(exponent, -REACH), REACH)


def scaled_grid(grid: Grid, factor: float) -> Grid:
    """The grid of weights ``factor`` times as large, a power of two; two-level scales become float32 ones."""
    if grid.bilevel is None:
        minimum = None if grid.minimum is None else grid.minimum * factor
        return replace(grid, scale=grid.scale * factor, minimum=minimum)
    level = grid.bilevel
    level = replace(level, base=level.base.float() * factor, step=level.step.float() * factor)
    return replace(grid, scale=level.expand(grid.scale.shape[0]), bilevel=level)


def scaled_answer(answer: QuantizedWeight, factor: float, spec: QuantSpec) -> QuantizedWeight:
    """The same codes for weights ``factor`` times as large, a power of two, under their own spec; outliers become
    float32 ones."""
    outliers = answer.outliers and replace(answer.outliers, value=answer.outliers.value.float() * factor)
    return replace(answer, grid=scaled_grid(answer.grid, factor), outliers=outliers, spec=spec)


def at_any_magnitude(solver: Callable[..., QuantizedWeight]) -> Callable[..., QuantizedWeight]:
    """The solver, for weights whose squares float32 cannot hold too."""

    @functools.wraps(solver)
    def solve(weight: Tensor, stats: GramStats | None, spec: QuantSpec, **options: Any) -> QuantizedWeight:
        k = exponent_outside(weight)
        if k == 0:
            return solver(weight, stats, spec, **options)
        down, up = 2.0**-k, 2.0**k
        finest = max(FINEST, math.ldexp(spec.finest, -k))
        inner = replace(spec, largest=math.ldexp(spec.largest, -k), finest=finest)
        if options.get("grid") is not None:
            options["grid"] = scaled_grid(options["grid"], down)
        if options.get("init") is not None:
            options["init"] = scaled_answer(options["init"], down, inner)
        return scaled_answer(solver(weight.detach().float() * down, stats, inner, **options), up, spec)

    return solve
