"""Quantized activations as numbers: what is asked for, their values on the grid, and the integers behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.core.names import FULL_BITS
from quant.core.rounding import FakeQuantize, NumberFormat
from quant.kernels.matmul.weight import IntegerInputs

METHODS = ("per_token", "per_tensor", "static")
SMALLEST_STEP = 1e-5  # of a token whose entries are all equal


@dataclass(frozen=True)
class ActSpec:
    """Bits of the linears' inputs, and of keys and values; 16 leaves them alone. Queries take the bits of the inputs
    where keys and values are quantized, so that their product is one of integers; else they are left alone.

    method: ``per_token`` (min and max of every token), ``per_tensor`` (of every call), ``static`` (of the whole
    calibration data, one range a linear; queries, keys and values stay per token). symmetric: the range is [-max|x|, max|x|] (inputs of
    linears only; what compressed-tensors checkpoints of others ask for).
    """

    bits: int = FULL_BITS
    kv_bits: int = FULL_BITS
    method: str = "per_token"
    symmetric: bool = False

    @property
    def active(self) -> bool:
        """Whether anything is quantized."""
        return min(self.bits, self.kv_bits) < FULL_BITS


def quantize_activations(
    x: Tensor,
    bits: int,
    *,
    whole: bool = False,
    span: Tensor | None = None,
    symmetric: bool = False,
    clip: Tensor | None = None,
) -> Tensor:
    """x [..., n] on an asymmetric grid of 2^bits levels over the range of every token, of the ``whole``, or ``span`` [2].

    clip: [2], factors of the lowest and highest entry of that range (FlatQuant, arXiv 2410.09426, section 3.1).
    Computed in float32 at least, returned in x's dtype; gradients reach x through its values and its range.
    """
    if bits >= FULL_BITS:
        return x
    rows = x if x.dtype == torch.float64 else x.float()
    if whole or span is not None:
        rows = rows.reshape(1, -1)
    numbers = NumberFormat(2**bits)
    scale, zero = _grid(rows, numbers, span, symmetric, clip)
    return FakeQuantize.apply(rows, scale, zero, numbers.qmax).view(x.shape).to(x.dtype)


def _grid(
    rows: Tensor, numbers: NumberFormat, span: Tensor | None, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of rows [..., n], over the range of each or over ``span``."""
    if span is None:
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    else:
        low, high = span.to(rows.dtype).view(2, 1, 1)
    if clip is not None:
        low, high = low * clip[0].to(rows.dtype), high * clip[1].to(rows.dtype)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / numbers.qmax).clamp(min=SMALLEST_STEP)
    return scale, torch.full_like(scale, numbers.middle) if symmetric else torch.round(-low / scale).detach()


def integer_inputs(x: Tensor, spec: ActSpec, span: Tensor | None = None, clip: Tensor | None = None) -> IntegerInputs:
    """The integers behind `quantize_activations` of x [n, in], at most 8 bits: x ≈ scale · (codes + offset), codes int8
    around the middle of the grid, scale and offset float32 [n]."""
    rows, numbers = x.float(), NumberFormat(2**spec.bits)
    whole = spec.method != "per_token" or span is not None
    scale, zero = _grid(rows.reshape(1, -1) if whole else rows, numbers, span, spec.symmetric, clip)
    codes = numbers.codes(rows, scale, zero).sub_(numbers.middle)
    shape = (x.shape[0], 1)
    return codes.to(torch.int8), scale.expand(shape).flatten(), (numbers.middle - zero).expand(shape).flatten()
