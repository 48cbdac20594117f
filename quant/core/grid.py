"""Fitting a uniform grid to weights: min-max or searched range, symmetric or not, per row or grouped; refitting zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from quant.core.level_grid import fit_levels, in_halves, in_tensor
from quant.core.real_grid import fit_scale_minimum
from quant.core.stacks import for_rows, times
from quant.core.stored import SMALLEST_HALF, at_least_finest, round_scale, short_scale, stored_fraction, within_largest
from quant.core.superblocks import fit_superblocks
from quant.core.types import Grid, QuantizedWeight, QuantSpec, group_index, is_short

SHRINKS = [1.0 - 0.01 * i for i in range(80)]  # the search of GPTQ's released code: 1.00, 0.99, ... 0.21
ENDS = [1.0 + 0.05 * i for i in range(-10, 11) if i]  # then either end of the range by itself
POWER = 2.0  # of the error
FEW_LEVELS, FEW_LEVELS_POWER = 5, 2.4  # on few levels that of GPTQ's released code
SMALLEST_NORMAL, LARGEST_HALF = 2.0**-14, 65504.0  # of float16
CHUNK = 1 << 24  # weights searched at a time: bounds the memory of the search on very large layers


def fit_scale_zero(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point over the last dimension.

    weight: float32 [..., n]. importance: [..., n], broadcastable, weights of the error |w - ŵ|² (|w - ŵ|^2.4 on
    up to 5 levels) that ``range="mse"`` minimizes over the two ends of the range (the Gram diagonal); ignored by
    min-max. Returns (scale float32 [...], zero int32 [...]). The range always includes 0.
    """
    lo, hi = weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)
    if spec.range == "minmax":
        return range_to_grid(lo, hi, spec)
    power = FEW_LEVELS_POWER if spec.numbers.levels <= FEW_LEVELS else POWER
    best_lo, best_hi, best_error = lo, hi, torch.full_like(lo, torch.inf)

    def consider(low: Tensor, high: Tensor) -> None:
        nonlocal best_lo, best_hi, best_error
        s, z = (t.unsqueeze(-1) for t in range_to_grid(low, high, spec))
        residual = weight - spec.numbers.values(weight, s, z)
        cost = residual.square_() if power == POWER else residual.abs_().pow_(power)
        error = (cost if importance is None else cost.mul_(importance)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_lo, best_hi = torch.where(better, low, best_lo), torch.where(better, high, best_hi)

    for shrink in SHRINKS:
        consider(lo * shrink, hi * shrink)
    if not spec.symmetric:
        shared_lo, shared_hi = best_lo, best_hi
        for factor in ENDS:
            consider(torch.maximum(shared_lo * factor, lo), shared_hi)
        nearest_lo = best_lo
        for factor in ENDS:
            consider(nearest_lo, torch.minimum(shared_hi * factor, hi))
    return range_to_grid(best_lo, best_hi, spec)


def range_to_grid(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The grid that covers [lo, hi], lo <= 0 <= hi.

    Asymmetric zero points are kept at 1 or above (GPTQ's v1 format stores zero - 1 and cannot hold 0);
    the scale then grows so that hi stays covered. All-zero ranges get scale 1. Ends that ``spec.largest`` does not
    allow are given up: the levels stay within it (see `within_largest`).
    """
    qmax, middle = spec.qmax, spec.numbers.middle
    empty = (lo == 0) & (hi == 0)
    if spec.symmetric:
        scale = torch.where(empty, 1.0, at_least_finest(round_scale(torch.maximum(-lo, hi) * (2 / qmax)), spec))
        centre = torch.full_like(scale, middle, dtype=torch.int32)
        return within_largest(scale, centre, spec), centre
    span = hi - lo
    step = torch.where(span.isinf(), hi / qmax - lo / qmax, span / qmax)
    scale = torch.where(empty, 1.0, at_least_finest(round_scale(step), spec))
    zero = torch.round(-lo / scale).clamp_(0, qmax)
    if qmax > 1:
        low = (zero < 1) & ~empty
        scale = torch.where(low, at_least_finest(round_scale(hi / (qmax - 1)), spec), scale)
        zero = zero.clamp_(min=1)
    zero = torch.where(empty, middle, zero).to(torch.int32)
    return within_largest(scale, zero, spec), zero


def fit_grid(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, order: Tensor | None = None) -> Grid:
    """Grid of a whole layer, weight float32 [out, in].

    importance: [in], or of every row [out, in], for ``range="mse"``. order: a permutation of the columns in which groups are formed
    (act-order without static groups); the returned g_idx refers to the original columns.
    Raises ValueError if the group size does not divide the inputs.
    """
    n_out, n_in = weight.shape
    n_groups = spec.n_groups(n_in)
    group = group_index(n_in, spec.group_size, weight.device)
    if order is not None and n_groups > 1:
        weight, importance = weight[:, order], None if importance is None else importance[..., order]
        group = torch.empty_like(group).index_copy_(0, order, group)
    grouped = weight.reshape(n_out, n_groups, -1)
    rows_at_once = max(1, CHUNK // n_in)
    rows_at_once = -(-rows_at_once // spec.shared_rows) * spec.shared_rows
    weights_of_error = repeat(None if importance is None else importance.view(n_groups, -1))
    if importance is not None and importance.dim() == 2:
        weights_of_error = iter(importance.view(n_out, n_groups, -1).split(rows_at_once))
    fit = fit_superblocks if spec.super_kind else fit_for(spec)
    parts = [fit(rows, spec, own) for rows, own in zip(grouped.split(rows_at_once), weights_of_error, strict=False)]
    scale, base = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if spec.has_minimum:
        return Grid.real(scale, base, group, spec.qmax)
    return Grid(scale, base, group, spec.qmax, table=spec.numbers.table)


def fit_for(spec: QuantSpec) -> Callable[[Tensor, QuantSpec, Tensor | None], tuple[Tensor, Tensor]]:
    """What fits groups one by one: their scales, and zero points or minima."""
    if spec.level_kind is not None:
        return fit_levels
    return fit_scale_minimum if spec.has_minimum else fit_scale_zero


def in_float16(answer: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """The answer for weight [out, in] with every scale, and minimum, a float16 number, as most checkpoints store them: of a
    row or group that is almost zero the nearest one, at least float16's smallest, with its values rounded again to the new
    grid; in what its kind stores, where its levels are not evenly spaced.

    The answer itself where all are that already, where scales are stored in two levels, and where the layer as a whole is
    out of float16's range: then its scales are needed as they are. Super-blocks have no others than float16's.
    """
    grid = answer.grid
    if answer.spec.super_kind is not None:
        return answer
    if answer.spec.level_kind is not None:
        return in_own_scales(answer)
    fractional = answer.spec.kind == "fractional"
    narrow = is_short(grid, answer.spec) if fractional else 32 not in (grid.scale_bits, grid.minimum_bits)
    if grid.bilevel is not None or narrow:
        return answer
    if misfit_float16(largest_of(weight), grid.qmax):
        return answer
    scale = grid.scale.clamp(min=SMALLEST_HALF).half().float()
    stored, changed = replace(grid, scale=scale), scale != grid.scale
    if grid.minimum is not None:
        stored = _short(grid, answer.spec) if fractional else replace(stored, minimum=grid.minimum.half().float())
        scale, changed = stored.scale, stored.scale != grid.scale
        changed |= stored.minimum != grid.minimum
    if not all(bool(torch.isfinite(t).all()) for t in (scale, stored.minimum) if t is not None):
        return answer
    moved = changed[:, grid.g_idx]
    codes = torch.where(moved, stored.quantize(grid.dequantize(answer.codes)), answer.codes)
    return replace(answer, codes=codes, grid=stored)


def in_own_scales(answer: QuantizedWeight) -> QuantizedWeight:
    """The answer with scales that its kind stores; what the whole tensor's E4M3 numbers move is rounded again."""
    grid = answer.grid
    assert answer.spec.level_kind is not None
    keep = {"e4m3": in_tensor, "half": in_halves}.get(answer.spec.level_kind.scale)
    if keep is None or torch.equal(scale := keep(grid.scale), grid.scale):
        return answer
    stored = replace(grid, scale=scale)
    moved = (scale != grid.scale)[:, grid.g_idx]
    codes = torch.where(moved, stored.quantize(grid.dequantize(answer.codes)), answer.codes)
    return replace(answer, codes=codes, grid=stored)


def _short(grid: Grid, spec: QuantSpec) -> Grid:
    """A grid of fractional zero points with short scales."""
    scale, minimum = stored_fraction(short_scale(grid.scale), grid.base, spec)
    return replace(grid, scale=scale, minimum=minimum)


def largest_of(weight: Tensor) -> float:
    """The largest |weight|; NaN where any is NaN."""
    low, high = weight.detach().aminmax()
    return float(torch.maximum(-low, high))


def misfit_float16(largest: float, qmax: int) -> str | None:
    """Why scales of a layer with this largest |weight| do not go into float16, in words; None where they do.

    Below float16's normal numbers they would lose much of every weight (a layer of zeros has scales of 1); above, the
    step of a range from -largest to largest in ``qmax`` parts is not finite there.
    """
    if 0 < largest < SMALLEST_NORMAL:
        return "all its weights are too small for that"
    return "its largest weight is too large for that" if largest > LARGEST_HALF * qmax / 2 else None


def refit_scale_zero(
    offsets: Tensor,
    scale: Tensor,
    zero: Tensor,
    gram: Tensor,
    correlation: Tensor,
    *,
    spec: QuantSpec,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The scale and zero point of one group of n columns that minimize ‖(W - Ŵ)X‖² for its codes as they are.

    offsets [out, n]: codes - zero. scale, zero [out]. gram [n, n], of a stack [parts, n, n]. correlation [out, n]: the group's columns of
    (W - Ŵ) Σ. Returns (scale [out], the change of the zero point [out]). With p = offsets - d for each change d of
    the zero point, the objective is quadratic in the new scale s: s²·pΣp - 2s·(p·c + scale·pΣoffsets) + const; the
    best s of the best d is taken, rounded and bounded as grids store it, where that lowers the objective. symmetric: d
    is 0.
    """
    # With q = offsets and 1 a row of ones: qΣq, qΣ1 [out] and 1Σ1; c·q and c·1 [out]. Every pΣp and p·c follows from them.
    products = times(offsets, gram)
    qq, q1, ones = (products * offsets).sum(1), products.sum(1), for_rows(gram.sum((-2, -1)), len(offsets))
    cq, c1 = (correlation * offsets).sum(1), correlation.sum(1)
    shift = scale.new_tensor((0.0,) if symmetric else (0.0, -1.0, 1.0))[:, None]  # [changes, 1]: all of them at once
    pp = qq - 2 * shift * q1 + shift**2 * ones  # pΣp
    pull = cq - shift * c1 + scale * (qq - shift * q1)  # p·c + scale·pΣq, so that the best s is pull / pp
    wanted, moved = torch.where(pp > 0, pull / pp, scale), zero + shift
    new = at_least_finest(round_scale(wanted), spec)
    new = within_largest(new, moved.clamp(0, spec.qmax), spec)
    # What s and d change of the objective: its quadratic at (new, d) less that at (scale, 0).
    gain = new * new * pp - 2 * new * pull - (scale * scale * qq - 2 * scale * (cq + scale * qq))
    # Zero points are 1 or above, as `range_to_grid` makes them; scales are positive.
    legal = (pp > 0) & (wanted > 0) & torch.isfinite(wanted)
    legal &= (moved >= min(1, spec.qmax - 1)) & (moved <= spec.qmax)
    gain = torch.where(legal, gain, torch.inf)
    best_scale, best_shift, best = scale, torch.zeros_like(scale), torch.zeros_like(scale)
    for d, s, lower in zip(shift, new, gain, strict=True):
        better = lower < best
        best = torch.where(better, lower, best)
        best_scale, best_shift = torch.where(better, s, best_scale), torch.where(better, d, best_shift)
    return best_scale, best_shift
