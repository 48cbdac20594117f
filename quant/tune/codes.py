"""A solved linear as a function of what is tuned of it: a position for every weight, and a factor for every scale.

    Ŵ = s · (Q - z),   Q = clip(⌊U⌉, 0, qmax),   s = s0 (1 + a),        or with a real minimum
    Ŵ = s · Q + m,     m = m0 + s0 b

U [out, in] is in code units, so that a change of s or m changes no code; z stays, and so do outliers. ∂Q/∂U is taken as 1
inside (-½, qmax + ½) and is 0 outside (the straight-through estimate of Bengio et al. 2013, arXiv 1308.3432; AutoRound,
arXiv 2309.05516, rounds W/s + V alike). U starts at the weight's own place W/s + z or (W - m)/s, moved into the cell of its solved
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
from quant.core.stored import at_least_finest, round_scale, stored_base, within_largest
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.tune.config import Tuning

# Of a cell, between a start and the nearest edge: near it codes that the solver moved go back in the first steps, all at once,
# and little data does not make up for that; far from it few codes move at all. Held-out divergence at 2 bits after 200 steps on 128
# windows (0.3106 at the start), and after 400 on 1024 (0.3686): 0.02: 0.326, 0.218; 0.1: 0.296, 0.213; 0.3: 0.286, 0.224.
MARGIN = 0.1
POSITION, FACTOR, OFFSET = ".position", ".factor", ".offset"  # names of a linear's parameters behind its own
Parameters = dict[str, Tensor]


class Groups:
    """Which columns of a grid share a scale: what is looked up once, so that no step asks the device."""

    def __init__(self, grid: Grid) -> None:
        self.index, self.count = grid.g_idx, grid.n_groups
        sizes = torch.bincount(self.index, minlength=self.count)
        self.equal = bool((sizes == sizes[0]).all())
        self.sorted = bool((self.index[1:] >= self.index[:-1]).all())
        self.order = torch.argsort(self.index, stable=True)

    def expand(self, values: Tensor) -> Tensor:
        """[out, G] for every column: [out, in], or as they are where rows have one group."""
        if self.count == 1:
            return values
        if self.equal and self.sorted:  # the gradient is a sum of neighbours and not one in any order
            size = len(self.index) // self.count
            return values.unsqueeze(-1).expand(-1, -1, size).reshape(len(values), -1)
        return values[:, self.index]

    def sum(self, values: Tensor) -> Tensor:
        """[out, in] over the columns of every group: [out, G]."""
        if self.equal:
            ordered = values if self.sorted else values[:, self.order]
            return ordered.view(len(values), self.count, -1).sum(-1)
        return values.new_zeros(len(values), self.count).index_add_(1, self.index, values)


class RoundPosition(torch.autograd.Function):
    """Weights of positions u, float32 [out, in]: s (clip(⌊u⌉, 0, qmax) - z), with s and z [out, G].

    Gradients: of u, s where -½ < u < qmax + ½ and 0 elsewhere; of s, Q - z; of z, if it is asked for, -s; the last two
    are sums over a group. It takes as few passes over the weights as torch's own operations allow.
    """

    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, groups: Groups, qmax: int) -> Tensor:
        """Round, clip and scale; keeps the positions and one tensor of their size."""
        levels = torch.round(position).clamp_(0, qmax).sub_(groups.expand(zero))
        ctx.save_for_backward(position, levels, scale)
        ctx.groups, ctx.qmax = groups, qmax
        return levels * groups.expand(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        """Straight through, where a code could follow."""
        position, levels, scale = ctx.saved_tensors
        of_scale = ctx.groups.sum(gradient * levels)
        passed = gradient * ctx.groups.expand(scale)
        of_zero = ctx.groups.sum(passed).neg_() if ctx.needs_input_grad[2] else None
        of_position = torch.ops.aten.hardtanh_backward(passed, position, -0.5, ctx.qmax + 0.5)
        return of_position, of_scale, of_zero, None, None


def codes_at(position: Tensor, qmax: int) -> Tensor:
    """clip(⌊u⌉, 0, qmax), uint8 [out, in]; u: positions, or what they were settled to."""
    return torch.round(position.float()).clamp_(0, qmax).to(torch.uint8)


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


class StoredLine(torch.autograd.Function):
    """Scales and minima as grids store them (see `stored_base`); the gradients pass."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, minimum: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Round and bound."""
        return stored_base(scale, minimum, spec)

    @staticmethod
    def backward(ctx: Any, of_scale: Tensor, of_minimum: Tensor) -> tuple[Tensor, Tensor, None]:
        """Straight through."""
        return of_scale, of_minimum, None


class TunedLinear:
    """One solved linear. spec: the grid that was asked for; before: the weight [out, in] that was solved. Grids of
    super-blocks, whose scales are small integers, stay as they are.

    Raises InputError for grids whose scales are quantized themselves: a factor would leave them.
    """

    keys: tuple[str, ...] = (POSITION, FACTOR)

    def __init__(self, where: str, start: QuantizedWeight, spec: QuantSpec, before: Tensor) -> None:
        if start.grid.bilevel is not None:
            raise InputError(
                f"{where}: --tune cannot hold scales that are quantized themselves (spqr); use another method"
            )
        if spec.level_kind is not None:
            raise InputError(f"{where}: --tune moves codes of evenly spaced levels: drop --grid {spec.kind}")
        self.start, self.spec, self.groups, self.before = start, spec, Groups(start.grid), before
        self.zero = start.grid.zero.float()
        if start.grid.minimum is not None:
            self.keys, self.zero = (POSITION, FACTOR, OFFSET), torch.zeros_like(start.grid.scale)
        if spec.super_kind is not None:
            self.keys = (POSITION,)

    def initial(self) -> Parameters:
        """Position and factor (and offset), float32, that give the solved answer."""
        weight, outliers, grid = self.before.float(), self.start.outliers, self.start.grid
        if outliers is not None:  # they are added to the codes' values
            weight = weight.flatten().index_add(0, outliers.index, -outliers.value.float()).view_as(weight)
        codes = self.start.codes.float()
        position = torch.clamp(grid.positions(weight), codes - 0.5 + MARGIN, codes + 0.5 - MARGIN)
        return {POSITION: position} | {key: torch.zeros_like(grid.scale) for key in self.keys if key != POSITION}

    def rates(self, tuning: Tuning) -> dict[str, float]:
        """The rate of every parameter."""
        return dict.fromkeys(self.keys, tuning.grid_rate) | {POSITION: tuning.rate_of(self.spec.bits)}

    def bounds(self) -> dict[str, tuple[float, float]]:
        """What parameters stay within: nothing."""
        return {}

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy of the parameters of which `answer` makes the same: of positions their codes alone, a byte a weight."""
        codes = codes_at(parameters[POSITION].detach(), self.start.grid.qmax)
        return {key: codes if key == POSITION else parameters[key].detach().clone() for key in self.keys}

    def grid(self, parameters: Mapping[str, Tensor]) -> Grid:
        """Scales, and minima, as they are stored."""
        grid = self.start.grid
        if self.spec.super_kind is not None:
            return grid
        scale = grid.scale * (1 + parameters[FACTOR])
        if grid.minimum is None:
            return replace(grid, scale=StoredScale.apply(scale, grid.zero, self.spec))
        scale, minimum = StoredLine.apply(scale, grid.minimum + grid.scale * parameters[OFFSET], self.spec)
        return replace(grid, scale=scale, minimum=minimum)

    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The deployed weight, float32 [out, in]: what `answer` dequantizes to, bit for bit, with gradients."""
        grid = self.grid(parameters)
        weight: Tensor = RoundPosition.apply(parameters[POSITION], grid.scale, self.zero, self.groups, grid.qmax)
        if grid.minimum is not None:
            weight = weight + self.groups.expand(grid.minimum)
        if (outliers := self.start.outliers) is not None:
            weight = weight.flatten().index_add(0, outliers.index, outliers.value.float()).view_as(weight)
        return weight

    @torch.no_grad()
    def answer(self, parameters: Mapping[str, Tensor]) -> QuantizedWeight:
        """Codes and grid at these parameters."""
        start = self.start
        codes = codes_at(parameters[POSITION], start.grid.qmax)
        moved = float((codes != start.codes).float().mean())
        return replace(
            start, codes=codes, grid=self.grid(parameters), info={**start.info, "codes_moved": moved}
        ).check()
