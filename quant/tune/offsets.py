"""AutoRound's weights: an offset of every weight before it is rounded, and a factor of either end of every range.

    Ŵ = s · (clip(⌊W/s + V⌉ + z, 0, qmax) - z),   s = (β·hi - α·lo) / qmax,   z = -⌊α·lo / s⌉

(Cheng et al. 2023, arXiv 2309.05516, section 3.) V [out, in] in [-½, ½] starts at 0, α and β [out, G] in [0, 1] at 1, so
that the start is rounding to nearest. lo <= 0 <= hi are the ends of the weights of a group; where the solver searched its
range, they are the ends of what it found, and α, β reach to 2 (arXiv 2512.04746). Every ⌊·⌉, and the rounding of s to what
grids store, passes gradients straight through. As everywhere here z is at least 1 where there are more than two levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.core.grid import range_to_grid
from quant.core.types import QuantizedWeight, QuantSpec
from quant.tune.codes import Groups, Parameters, RoundPosition, codes_at
from quant.tune.config import Tuning

OFFSET, LOW, HIGH = ".offset", ".low", ".high"  # names of a linear's parameters behind its own
SEARCHED = 2.0  # how far a searched range may grow


class Straight(torch.autograd.Function):
    """The value of ``exact`` with the gradient of ``smooth``."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        """What is exact."""
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """To what is smooth."""
        return gradient, None


class OffsetLinear:
    """One linear that was rounded to nearest. spec: the grid that was asked for; before: the weight [out, in] that was
    rounded. Raises InputError where the start is not codes on a plain grid."""

    keys = (OFFSET, LOW, HIGH)

    def __init__(self, where: str, start: QuantizedWeight, spec: QuantSpec, before: Tensor) -> None:
        if spec.kind != "integer":
            raise InputError(f"{where}: autoround tunes integer zero points: drop --grid {spec.kind}, or use --tune")
        if start.outliers is not None or start.grid.bilevel is not None:
            raise InputError(
                f"{where}: autoround begins with weights that are rounded to nearest, not with this method's"
            )
        self.start, self.spec, self.groups, self.before = start, spec, Groups(start.grid), before.float()
        grid, qmax = start.grid, start.grid.qmax
        grouped = self.before.view(len(before), grid.n_groups, -1)
        self.low, self.high, self.most = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0), 1.0
        scale, zero = range_to_grid(self.low, self.high, spec)
        if not (torch.equal(scale, grid.scale) and torch.equal(zero, grid.zero)):
            below = torch.full_like(grid.scale, qmax / 2) if spec.symmetric else grid.zero.float()
            self.low, self.high, self.most = -below * grid.scale, (qmax - below) * grid.scale, SEARCHED

    def initial(self) -> Parameters:
        """Offsets of 0 and factors of 1, float32."""
        ones = torch.ones_like(self.low)
        return {OFFSET: torch.zeros_like(self.before), LOW: ones, HIGH: ones.clone()}

    def rates(self, tuning: Tuning) -> dict[str, float]:
        """The rate of every parameter: of factors that of offsets, unless one is given."""
        rate = tuning.rate_of(self.spec.bits)
        return {OFFSET: rate, LOW: tuning.grid_rate or rate, HIGH: tuning.grid_rate or rate}

    def bounds(self) -> dict[str, tuple[float, float]]:
        """What parameters stay within."""
        return {OFFSET: (-0.5, 0.5), LOW: (0.0, self.most), HIGH: (0.0, self.most)}

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy of the parameters of which `answer` makes the same: all of them, since ranges move codes."""
        return {key: parameters[key].detach().clone() for key in self.keys}

    def _grid(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scales and zero points [out, G], float32, as they are stored."""
        low, high, qmax = self.low * parameters[LOW], self.high * parameters[HIGH], self.start.grid.qmax
        with torch.no_grad():
            stored, zero = range_to_grid(low, high, self.spec)
        if self.spec.symmetric:
            return Straight.apply(torch.maximum(-low, high) * (2 / qmax), stored), zero.float()
        scale: Tensor = Straight.apply((high - low) / qmax, stored)
        return scale, Straight.apply(-low / scale, zero.float())

    def _position(self, parameters: Mapping[str, Tensor], scale: Tensor, zero: Tensor) -> Tensor:
        """W/s + V + z."""
        return self.before / self.groups.expand(scale) + (self.groups.expand(zero) + parameters[OFFSET])

    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The deployed weight, float32 [out, in]: what `answer` dequantizes to, bit for bit, with gradients."""
        scale, zero = self._grid(parameters)
        position = self._position(parameters, scale, zero)
        weight: Tensor = RoundPosition.apply(position, scale, zero, self.groups, self.start.grid.qmax)
        return weight

    @torch.no_grad()
    def answer(self, parameters: Mapping[str, Tensor]) -> QuantizedWeight:
        """Codes, scales and zero points at these parameters."""
        scale, zero = self._grid(parameters)
        codes = codes_at(self._position(parameters, scale, zero), self.start.grid.qmax)
        moved = float((codes != self.start.codes).float().mean())
        grid = replace(self.start.grid, scale=scale, zero=zero.to(torch.int32))
        info = {**self.start.info, "codes_moved": moved}
        return replace(self.start, codes=codes, grid=grid, info=info).check()
