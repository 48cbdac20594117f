"""Quantized activations as numbers: what is asked for, their values on the grid, and the integers behind them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.core.levels import E2M1, E4M3_LARGEST, E4M3_SMALLEST, level_tensors
from quant.core.names import FULL_BITS, LEVEL_GRIDS
from quant.core.rounding import NumberFormat
from quant.kernels.matmul.weight import IntegerInputs
from quant.kernels.rounding import FakeQuantize, Span

METHODS = ("per_token", "per_tensor", "static")
SMALLEST_STEP = 1e-5  # of a token whose entries are all equal


@dataclass(frozen=True)
class ActSpec:
    """Bits of the linears' inputs, and of keys and values; 16 leaves them alone. Queries take the bits of the inputs
    where keys and values are quantized, so that their product is one of integers; else they are left alone.

    method: ``per_token`` (min and max of every token), ``per_tensor`` (of every call), ``static`` (of the whole
    calibration data, one range a linear; queries, keys and values stay per token). symmetric: the range is [-max|x|, max|x|] (inputs of
    linears only; what compressed-tensors checkpoints of others ask for). kind: other numbers than integers, whose bits and
    scales are their own (`quantize_to_levels`); keys and values have none.
    """

    bits: int = FULL_BITS
    kv_bits: int = FULL_BITS
    method: str = "per_token"
    symmetric: bool = False
    kind: str = "integer"

    @classmethod
    def on(cls, kind: str) -> ActSpec:
        """Inputs of linears in ``nvfp4``, ``mxfp4`` or ``fp8``."""
        return cls(LEVEL_GRIDS[kind].bits, kind=kind)

    def to_json(self) -> dict[str, Any]:
        """What files keep; ``ActSpec(**...)`` takes it back. Files from before there were kinds have none."""
        return {name: value for name, value in asdict(self).items() if name != "kind" or value != "integer"}

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


def quantize_to_levels(x: Tensor, kind: str) -> Tensor:
    """x [..., n] as these numbers, in x's dtype; gradients pass straight through.

    fp8: E4M3 with a scale a token, max|x| / 448. mxfp4: E2M1 with a power of two for 32 columns, floor(log2 max|x|) - 2 (OCP
    Microscaling Formats 1.0, section 6.3). nvfp4: E2M1 with an E4M3 scale for 16 columns, max|x| / 6, in units of max|x| /
    (6 · 448) of the token (in other software of the calibration data). Halves go to the even mantissa. The last group of a row
    may be short.
    """
    rows = x.detach().float()
    if kind == "fp8":
        scale = _not_zero(rows.abs().amax(-1, keepdim=True) / E4M3_LARGEST)
        values = _in_e4m3(rows / scale) * scale
    else:
        size, n = LEVEL_GRIDS[kind].groups[0], x.shape[-1]
        groups = F.pad(rows, (0, -n % size)).unflatten(-1, (-1, size))
        largest = groups.abs().amax(-1, keepdim=True)
        if kind == "mxfp4":
            scale = torch.ldexp(torch.ones_like(largest), (torch.frexp(_not_zero(largest))[1] - 3).clamp(-127, 127))
        else:
            unit = _not_zero(largest.amax(-2, keepdim=True) / (E2M1[-1] * E4M3_LARGEST))
            scale = _in_e4m3((largest / E2M1[-1] / unit).clamp(min=E4M3_SMALLEST)) * unit
        values = (_in_e2m1(groups / scale) * scale).flatten(-2)[..., :n]
    return x + (values.to(x.dtype) - x).detach() if x.requires_grad else values.to(x.dtype)


def _not_zero(numbers: Tensor) -> Tensor:
    return numbers.clamp(min=torch.finfo(torch.float32).tiny)


def _in_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()


def _in_e2m1(x: Tensor) -> Tensor:
    """Of two levels that are equally near the one with the even mantissa, which is every other one."""
    (levels, middles), size = level_tensors(E2M1, x.device, x.dtype), x.abs()
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    return torch.copysign(levels[torch.where(below % 2 == 0, below, above)], x)


def _grid(
    rows: Tensor, numbers: NumberFormat, span: Tensor | None, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of rows [..., n], over the range of each or over ``span``."""
    if span is None:
        low, high = Span.apply(rows)
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
