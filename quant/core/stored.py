"""Scales and minima as grids store them: float16 where that is near enough, and no level beyond what a dtype holds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from quant.core.types import CUT, FINEST, LARGEST, ZERO_STEPS, QuantSpec, minimum_at, most_steps

SMALLEST_HALF = 2.0**-24  # of float16
FINEST_STEP = 2.0**-11  # of a minimum: a step is no finer than float16 is there; 0 then lies at most 2^11 steps away
SHORT_FINEST, SHORT_LARGEST = 2.0 ** (CUT - 24), (2 - 2.0 ** (CUT - 10)) * 2.0**15  # float16 numbers without last bits
SHORT_DIGITS = 11 - CUT  # binary ones of a short scale
HALF_BELOW, BELOW = 1 - 2.0**-10, 1 - 2.0**-20  # times a number: what float16 and float32 round to no more than it


def round_scale(scale: Tensor) -> Tensor:
    """The nearest fp16 number where that is within 1/64 (checkpoints store fp16), else the scale itself."""
    half = scale.half().float()
    return torch.where((half - scale).abs() <= scale / 64, half, scale)


def multiple_of_finest(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The next multiple of ``spec.finest``, which every float32 is of float32's own."""
    return scale if spec.finest == FINEST else (scale / spec.finest).ceil() * spec.finest


def at_least_finest(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale as float32 can hold it besides the weights: none is 0."""
    return multiple_of_finest(scale, spec).clamp(min=spec.finest)


def within_largest(scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Scales that let no level exceed ``spec.largest``: as they are, or the largest that is stored (fp16 if it is near).

    scale float32, zero int32 or float32 of the same shape.
    """
    # Of weights that are not finite, as learning may make them before it goes back, zero points are no numbers either.
    steps = torch.maximum(zero, spec.qmax - zero).long().clamp_(0, spec.qmax)
    highest = largest_scales(spec.qmax, spec.largest, scale.device)[steps]
    return torch.where(scale > highest, highest, scale)


@lru_cache(maxsize=256)
def largest_scales(qmax: int, largest: float, device: torch.device) -> Tensor:
    """float32 [qmax + 1]: the largest scale of which 0, 1, ... qmax steps stay within ``largest``, rounded down."""
    exact = min(largest, LARGEST) / np.arange(1, qmax + 1)
    wide = exact.astype(np.float32)
    wide = np.where(wide > exact, np.nextafter(wide, np.float32(0)), wide)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    half = np.where(half > wide, np.nextafter(half, np.float16(0)), half).astype(np.float32)
    stored = np.where(wide - half <= wide / 64, half, wide)
    return torch.tensor([LARGEST, *stored.tolist()], dtype=torch.float32, device=device)


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that a grid of this kind stores for one, as far as it depends on nothing else."""
    if spec.kind != "fractional":
        return at_least_finest(round_scale(scale), spec)
    highest = min(spec.largest, LARGEST) * BELOW / 2**spec.code_bits  # no level is further from 0
    scale = scale.clamp(spec.finest * (ZERO_STEPS << SHORT_DIGITS), highest * (1 - 2.0**-SHORT_DIGITS))
    mantissa, exponent = torch.frexp(scale)
    nearest = torch.ldexp((mantissa * 2.0**SHORT_DIGITS).round_(), exponent - SHORT_DIGITS)
    short = short_scale(nearest)
    return torch.where((short - nearest).abs() <= nearest / 64, short, nearest)


def short_scale(scale: Tensor) -> Tensor:
    """Scales of SHORT_DIGITS binary digits as float16 numbers whose last CUT bits are 0, at least the smallest of them."""
    fine = (scale / SHORT_FINEST).round() * SHORT_FINEST
    return torch.where(scale < 2.0**-14, fine, scale).clamp(SHORT_FINEST, SHORT_LARGEST)


def stored_base(scale: Tensor, minimum: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The scale and minimum that a grid with minima stores for these, float32 of one shape."""
    return stored_fraction(scale, minimum, spec) if spec.kind == "fractional" else stored_real(scale, minimum, spec)


def stored_fraction(scale: Tensor, minimum: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The same for fractional zero points: -minimum / scale is a multiple of 1/ZERO_STEPS from 0 to below 2^bits."""
    scale = stored_scale(scale, spec)
    steps = (-minimum / scale * ZERO_STEPS).round_().clamp_(0, most_steps(spec) - 1)
    return scale, minimum_at(scale, steps)  # 7 and at most 13 binary digits: float32 holds their product


def stored_real(scale: Tensor, minimum: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The scale and minimum that a real grid stores for these, float32 of one shape: a step of at least FINEST_STEP of the
    minimum, neither a level nor a range beyond ``spec.largest`` (float32 holds scale * code), multiples of ``spec.finest``, float16 numbers where they are near.

    A minimum is near where float16 keeps its precision, or moves it by at most 1/64 of a step.
    """
    qmax, largest = spec.qmax, min(spec.largest, LARGEST)
    minimum = minimum.clamp(-largest * BELOW, largest * BELOW / (1 + 1.01 * FINEST_STEP * qmax))  # room for qmax steps
    scale = torch.maximum(scale, minimum.abs() * FINEST_STEP).clamp(max=largest / qmax)
    scale = at_least_finest(round_scale(scale), spec)
    half = minimum.half().float()
    near = (half - minimum).abs() <= torch.maximum(scale / 64, minimum.abs() * FINEST_STEP)
    minimum = torch.where(near, half, minimum)
    if spec.finest != FINEST:
        minimum = (minimum / spec.finest).round() * spec.finest
    highest = (largest / qmax - minimum.clamp(min=0) / qmax) * BELOW
    half = (highest * HALF_BELOW).half().float()
    highest = torch.where((highest - half).abs() <= highest / 64, half, highest)
    return torch.where(scale > highest, highest, scale), minimum
