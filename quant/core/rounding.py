"""Rounding to a grid and to a dtype that gradients pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FakeQuantize(torch.autograd.Function):
    """(clamp(round(x / scale) + zero, 0, qmax) - zero) · scale, with the straight-through estimate of round.

    x [..., n]; scale, zero broadcastable with one entry along n. Gradient of x: passes where the code is not
    clamped. Of scale: the code's distance to zero, less x / scale where not clamped. Of zero: none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
        """Quantize and take back; keeps two tensors for the backward pass."""
        ratio = x / scale
        rounded = torch.round(ratio).add_(zero)
        codes = rounded.clamp(0, qmax)
        inside = codes == rounded
        codes.sub_(zero)
        out = codes * scale
        # d out / d scale with round treated as the identity where it is not clamped
        ctx.save_for_backward(codes.sub_(ratio.mul_(inside)), inside)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of x and scale."""
        slope, inside = ctx.saved_tensors
        return gradient * inside, (gradient * slope).sum(-1, keepdim=True), None, None


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
