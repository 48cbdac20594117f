"""Scales of grids whose levels are not evenly spaced (`quant.core.levels`): fitted to weights, and refitted to codes as they are.

A scale that rows share (fp8 in blocks) stands in every row of the grid. The number of nvfp4's tensor is a power of two,
which a float costs nothing: `tensor_unit` finds it in the scales, and E4M3 times it is exact. Where one side of the levels
reaches further (iq4_nl) a scale below 0 turns them round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant.core.levels import E4M3_LARGEST, E4M3_SMALLEST, TABLES, level_codes, levels_of
from quant.core.names import LEVEL_GRIDS
from quant.core.stacks import times
from quant.core.stored import SMALLEST_HALF, round_scale
from quant.core.types import LARGEST, QuantSpec

FACTORS = [1.2 - 0.02 * i for i in range(36)]  # of the scale that covers the range, down to 0.5
# Of a power of two: a scale above it takes that power, as OCP's floor(log2 |w|) - 2 does with |w| = 6 scale
HALF_WAY = 2 / 3
NORMAL = 2.0**23  # times float32's finest number: its least normal one, which an exponent of two alone stores


def shared(numbers: Tensor, spec: QuantSpec, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Numbers [out, ...] of which every row has what ``reduce`` makes of the rows that share its scales."""
    rows = spec.shared_rows
    if rows == 1:
        return numbers
    parts = [reduce(part, 0).expand_as(part) for part in numbers.split(rows)]
    return torch.cat(parts)


def stored_levels(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that a grid of this kind stores for one: that many digits, and no level beyond ``spec.largest``. float32.

    The least E4M3 number is a matter of the whole tensor: see `in_tensor`."""
    kind, highest = LEVEL_GRIDS[spec.kind], min(spec.largest, LARGEST) / (2 * max(map(abs, TABLES[spec.kind])))
    if spec.has_signed_scales:
        scale, sign = scale.abs(), torch.where(scale < 0, -1.0, 1.0)
        return sign * round_scale(scale.clamp(max(16 * spec.finest, SMALLEST_HALF), highest))
    scale = scale.clamp(16 * spec.finest, highest)
    mantissa, exponent = torch.frexp(scale)
    if kind.scale == "e8m0":
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa <= HALF_WAY).int())
        return power.clamp(min=NORMAL * spec.finest)
    if kind.scale == "e4m3":
        return torch.ldexp((mantissa * 16).round_(), exponent - 4)
    return scale


def covering(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The scales of which the levels reach the ends of weight [out, ..., n], and 1 for zeros: [out, ...]."""
    table = TABLES[spec.kind]
    low, high = weight.amin(-1), weight.amax(-1)
    scale = shared(torch.maximum(high / table[-1], low / table[0]), spec, Tensor.amax)
    if spec.has_signed_scales:
        turned = torch.maximum(high / -table[0], low / -table[-1])
        scale = torch.where(turned < scale, -turned, scale)
    return torch.where(scale != 0, scale, 1.0)


def fit_levels(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale float32 [out, ...] over the last dimension of weight float32 [out, ..., n], and zeros int32 in the place of zero
    points. Min-max: the range is covered (nearly, where few scales are stored); ``range="mse"``: the factor of FACTORS with
    the least Σ importance · (w - ŵ)². importance: [..., n], broadcastable (the Gram diagonal)."""
    table, whole = TABLES[spec.kind], covering(weight, spec)
    scale = stored_levels(whole, spec)
    if spec.range == "mse":
        best = torch.full_like(scale, torch.inf)
        for factor in (*FACTORS, *(-factor for factor in FACTORS if spec.has_signed_scales)):
            tried = stored_levels(whole * factor, spec)
            residual = (
                levels_of(level_codes(weight / tried[..., None], table), table).mul_(tried[..., None]).sub_(weight)
            )
            cost = residual.square_()
            error = shared((cost if importance is None else cost.mul_(importance)).sum(-1), spec, Tensor.sum)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def refit_levels(levels: Tensor, scale: Tensor, gram: Tensor, correlation: Tensor, spec: QuantSpec) -> Tensor:
    """The scale [out] of one group of n columns that minimizes ‖(W - Ŵ)X‖² for its codes as they are, where that is lower.

    levels [out, n]: of the codes. gram [n, n], of a stack [parts, n, n]. correlation [out, n]: the group's columns of
    (W - Ŵ) Σ. With q = levels the objective is s²·qΣq - 2s·(q·c + scale·qΣq) + const, summed over rows that share s.
    """
    qq = shared((times(levels, gram) * levels).sum(1), spec, Tensor.sum)
    pull = shared((correlation * levels).sum(1), spec, Tensor.sum) + scale * qq
    wanted = torch.where(qq > 0, pull / qq, scale)
    legal = (qq > 0) & (wanted * scale > 0) & torch.isfinite(wanted)
    new = stored_levels(torch.where(legal, wanted, scale), spec)
    gain = (new * new - scale * scale) * qq - 2 * (new - scale) * pull
    return torch.where(legal & (gain < 0), new, scale)


def tensor_unit(scale: Tensor) -> float:
    """The power of two by which E4M3 numbers give the scales of a whole tensor: the least that keeps them within 448."""
    return float(2.0 ** torch.ceil(torch.log2(scale.double().amax() / E4M3_LARGEST)).clamp(-126, 118))


def in_tensor(scale: Tensor) -> Tensor:
    """The nearest scales that are E4M3 numbers times the tensor's unit; none is 0."""
    unit = tensor_unit(scale)
    return (scale / unit).clamp(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float() * unit


def in_halves(scale: Tensor) -> Tensor:
    """The nearest scales of either sign that are float16 numbers, none 0; as they are where one is too large for that."""
    stored = torch.copysign(scale.abs().clamp(min=SMALLEST_HALF).half().float(), scale)
    return stored if bool(torch.isfinite(stored).all()) else scale
