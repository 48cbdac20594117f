"""A solved linear as a function of what is tuned of it: a position for every weight, and a factor for every scale.

    Ŵ = s · (Q - z),   Q = clip(⌊U⌉, 0, qmax),   s = s0 (1 + a)

U [out, in] is in code units, so that a change of s changes no code; z stays, and so do outliers. ∂Q/∂U is taken as 1
inside [-½, qmax + ½] and is 0 outside (the straight-through estimate of Bengio et al. 2013, arXiv 1308.3432; AutoRound,
arXiv 2309.05516, rounds W/s + V alike). U starts at the weight's own place W/s + z, moved into the cell of its solved
code: the start is the solved answer exactly, and a weight that the solver pushed away from the nearest code is close to
the edge over which it would go back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.core.grid import at_least_finest, round_scale, within_largest
from quant.core.types import QuantizedWeight, QuantSpec

MARGIN = 0.02  # of a cell, between a start and the nearest edge
POSITION, FACTOR = ".position", ".factor"  # names of a linear's parameters behind its own
Parameters = dict[str, Tensor]


class RoundPosition(torch.autograd.Function):
    """Codes of positions, as floats: clip(⌊u⌉, 0, qmax). The gradient passes inside [-½, qmax + ½]."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, qmax: int) -> Tensor:
        """Nearest codes; keeps a mask."""
        ctx.save_for_backward((position >= -0.5) & (position <= qmax + 0.5))
        return torch.round(position).clamp_(0, qmax)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Straight through, where a code could follow."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


class StoredScale(torch.autograd.Function):
    """Scales as grids store them (float16 wherever near, no level beyond what the weights' dtype holds); the gradient
    passes."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        """Round and bound."""
        return within_largest(at_least_finest(round_scale(scale), spec), zero, spec)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Straight through."""
        return gradient, None, None


class TunedLinear:
    """One solved linear. weight: float32 [out, in] that was solved; spec: the grid that was asked for.

    Raises InputError for grids whose scales are quantized themselves: a factor would leave them.
    """

    def __init__(self, where: str, start: QuantizedWeight, spec: QuantSpec) -> None:
        if start.grid.bilevel is not None:
            raise InputError(
                f"{where}: --tune cannot hold scales that are quantized themselves (spqr); use another method"
            )
        self.start, self.spec = start, spec

    def initial(self, weight: Tensor) -> Parameters:
        """Position and factor that give the solved answer. weight: float32 [out, in], as it was before it was solved."""
        outliers, grid = self.start.outliers, self.start.grid
        if outliers is not None:  # they are added to the codes' values
            weight = weight.flatten().index_add(0, outliers.index, -outliers.value.float()).view_as(weight)
        scale, zero = grid.expand()
        codes = self.start.codes.float()
        position = torch.clamp(weight / scale + zero, codes - 0.5 + MARGIN, codes + 0.5 - MARGIN)
        return {POSITION: position, FACTOR: torch.zeros_like(grid.scale)}

    def scale(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Scales [out, G] as they are stored."""
        grid = self.start.grid
        scale: Tensor = StoredScale.apply(grid.scale * (1 + parameters[FACTOR]), grid.zero, self.spec)
        return scale

    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The deployed weight, float32 [out, in]: what `answer` dequantizes to, bit for bit, with gradients."""
        grid = replace(self.start.grid, scale=self.scale(parameters))
        scale, zero = grid.expand()
        weight = (RoundPosition.apply(parameters[POSITION], grid.qmax) - zero) * scale
        if (outliers := self.start.outliers) is not None:
            weight = weight.flatten().index_add(0, outliers.index, outliers.value.float()).view_as(weight)
        return weight

    @torch.no_grad()
    def answer(self, parameters: Mapping[str, Tensor]) -> QuantizedWeight:
        """Codes and scales at these parameters."""
        start = self.start
        codes = RoundPosition.apply(parameters[POSITION], start.grid.qmax).to(torch.uint8)
        moved = float((codes != start.codes).float().mean())
        grid = replace(start.grid, scale=self.scale(parameters))
        return replace(start, codes=codes, grid=grid, info={**start.info, "codes_moved": moved}).check()
