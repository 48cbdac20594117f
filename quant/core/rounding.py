"""Rounding to a grid, plainly and so that gradients pass, and to a dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.core.levels import Table, level_codes, levels_of


@dataclass(frozen=True)
class NumberFormat:
    """The numbers that codes stand for, of weights and of activations: the integers 0..levels-1, and a value is
    ``scale * (code - zero)``; or those of a ``table`` in ascending order, and it is ``scale * table[code]``.

    x is any float tensor; scale and zero broadcast against it. Halfway between two integers, the even one is taken.
    """

    levels: int
    table: Table | None = None

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.levels - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return self.levels // 2

    @property
    def code_bits(self) -> int:
        """Bits that one code takes in storage (3 for five levels)."""
        return math.ceil(math.log2(self.levels))

    def codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes of x, in its dtype."""
        if self.table is not None:
            return level_codes(x / scale, self.table).to(x.dtype)
        return (x / scale).round_().add_(zero).clamp_(0, self.qmax)

    def steps(self, codes: Tensor, zero: Tensor) -> Tensor:
        """Values of codes over their scale, float32."""
        return codes.float() - zero if self.table is None else levels_of(codes, self.table)

    def values(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Values of the nearest codes of x."""
        codes = self.codes(x, scale, zero)
        return (codes.sub_(zero) if self.table is None else levels_of(codes, self.table, x.dtype)).mul_(scale)


class RoundTo(torch.autograd.Function):
    """Values as a checkpoint of another dtype holds them; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """To the dtype and back."""
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Straight through."""
        return gradient, None
