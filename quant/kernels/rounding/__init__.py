"""Fake quantization that gradients pass: values on grids, and the spans that the grids cover.

Training takes both of every weight and of every input of a linear, forward and backward, so that they are passed over as few
times as possible: in loops over rows compiled with numba for float32 on a CPU, by torch's own operations (the reference) everywhere
else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.core.recording import as_one
from quant.kernels.rounding import reference

__all__ = ["FakeQuantize", "Span"]


def _loops(x: Tensor) -> Any:
    """What computes for a tensor."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return reference
    from quant.kernels.rounding import cpu  # numba, which takes a second, is for those who quantize

    return cpu


class FakeQuantize(torch.autograd.Function):
    """(clamp(round(x / scale) + zero, 0, qmax) - zero) · scale with the straight-through estimate of round.

    x [..., n]; scale, zero [..., 1]. Gradient of x: passes where the code is not clamped. Of scale: the code's distance to zero,
    less x / scale where not clamped. Of zero: none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
        """Quantize and take back; keeps what it was given."""
        ctx.save_for_backward(x, scale, zero)
        ctx.qmax = qmax
        values: Tensor = as_one(_loops(x).quantize, x, scale, zero, qmax)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of x and scale."""
        x, scale, zero = ctx.saved_tensors
        return *_loops(x).quantize_gradient(x, scale, zero, ctx.qmax, gradient), None, None


class Span(torch.autograd.Function):
    """Lowest and highest entry [..., 1] of x [..., n]; entries that are equally low or high share the gradient evenly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # three times as fast as `aminmax`
        ctx.save_for_backward(x, low, high)
        return low, high

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_low: Tensor, of_high: Tensor) -> Tensor:
        """The gradient of x."""
        x, low, high = ctx.saved_tensors
        gradient: Tensor = _loops(x).span_gradient(x, low, high, of_low, of_high)
        return gradient
