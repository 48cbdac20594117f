"""The reference, on any device and in any dtype: x [..., n], one scale, zero point and span [..., 1] a row."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.rounding import NumberFormat


def quantize(x: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Values of the nearest codes of x."""
    return NumberFormat(qmax + 1).values(x, scale, zero)


def quantize_gradient(x: Tensor, scale: Tensor, zero: Tensor, qmax: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and scale, given that of the values; round is the identity where a code is not clamped."""
    ratio = x / scale
    rounded = torch.round(ratio).add_(zero)
    codes = rounded.clamp(0, qmax)
    inside = codes == rounded
    slope = codes.sub_(zero).sub_(torch.where(inside, ratio, 0))
    return torch.where(inside, gradient, 0), (gradient * slope).sum(-1, keepdim=True)


def span_gradient(x: Tensor, low: Tensor, high: Tensor, of_low: Tensor, of_high: Tensor) -> Tensor:
    """The gradient of x, given those of its ends."""
    gradient = torch.zeros_like(x)
    for end, of_end in ((low, of_low), (high, of_high)):
        there = x == end
        gradient += torch.where(there, of_end / there.sum(-1, keepdim=True).clamp(min=1), 0)
    return gradient
