"""SpQR: GPTQ's sweep with small groups, scales quantized themselves, and sensitive weights kept as outliers."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_grid, fit_scale_zero, largest_scales, multiple_of_finest, range_to_grid
from quant.core.linalg import damped_factor
from quant.core.outliers import kept_outliers
from quant.core.types import BilevelScales, Grid, QuantizedWeight, QuantSpec
from quant.solvers import Options, solver
from quant.solvers.gptq import feedback_rounding, gptq_bytes, visiting_order


def spqr_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """As GPTQ, and at the end of the sweep the outliers are collected: 8.25 weights and the factor."""
    return max(gptq_bytes(n_out, n_in, options, group_size), 8.25 * 4 * n_out * n_in + 4.0 * n_in**2)


# Scales of two levels are more than most formats hold, also without outliers.
@solver("spqr", outliers=lambda options: True, workspace=spqr_bytes, rows_coupled=True)
def spqr(
    weight: Tensor,
    stats: GramStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    outlier: float = 0.0,
    percdamp: float = 0.01,
    auto_damp: bool = False,
    act_order: bool = False,
    simplified_outliers: bool = False,
    scale_bits: int = 3,
    scale_group: int = 16,
    block_size: int = 128,
) -> QuantizedWeight:
    """SpQR (Algorithm 1) for weight [out, in]; the paper uses groups of 16 (``spec.group_size``).

    outlier: the relative threshold τ (0: no outliers; smaller keeps more). A weight stays in 16 bits where its error
    ((w - Q(w)) / U_jj)² exceeds T = τ · mean_j(Var(W_j) / U_jj²). When the sweep reaches a group, weights whose
    removal from the range lowers the group's error by more than T do not count for the range, unless
    simplified_outliers. Scales are stored in scale_bits, with a base and a step shared by scale_group rows.
    Deviation: zero points are integers (``round_zero`` of the released code) and need no second level.
    A given grid is used as it is, in one level. With act_order groups are formed in visiting order, which must be stored. Raises SingularGramError, see there.
    """
    if not 1 <= scale_bits <= 8 or scale_group < 1:
        raise ValueError(f"scale_bits={scale_bits}, scale_group={scale_group}: use 1 to 8 bits and 1 or more rows")
    weight = weight.detach().float()
    stats.check()
    order = visiting_order(stats.diagonal, spec, act_order)
    upper, used_damp = damped_factor(stats.gram[order][:, order] if act_order else stats.gram, percdamp, auto_damp)
    # 1 / U_jj² of the inverse's factor; the factor holds a 1 for a column without inputs, where no error counts.
    sensitivity = upper.diagonal().square().masked_fill(stats.diagonal[order] == 0, 0.0)
    given = grid is not None
    grid = grid or fit_grid(weight, replace(spec, range="minmax"), None, order if act_order else None)
    spread = weight.var(0, correction=0)[order] * sensitivity
    # Weights that do not vary over the rows (a layer of one row) give no threshold, and no outliers.
    threshold = (
        torch.where(spread.mean() > 0, outlier * spread.mean(), torch.inf)
        if outlier > 0
        else spread.new_tensor(torch.inf)
    )
    levels: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def fit(part: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        importance = sensitivity[columns]
        keep = torch.ones_like(part, dtype=torch.bool)
        if outlier > 0 and not simplified_outliers:
            keep = ~range_outliers(part, spec, importance, threshold)
        lo, hi = _range(part, keep)
        if spec.range == "mse":
            scale, zero = fit_scale_zero(part * keep, spec, importance * keep)
            lo, hi = -zero * scale, (spec.qmax - zero) * scale
        scale, *stored = _two_levels(lo, hi, part, keep, importance, spec, scale_bits, scale_group)
        levels[int(grid.g_idx[order[columns.start]])] = (stored[0], stored[1], stored[2])
        return scale, zero_point(lo, hi, scale, spec)

    visited = replace(grid, g_idx=grid.g_idx[order])
    target = weight[:, order].contiguous()
    codes, scale, zero, work, errors = feedback_rounding(
        target, upper, visited, spec, None if given else fit, block_size, threshold / sensitivity
    )
    back = torch.argsort(order)
    columns = visited.g_idx
    coded = (codes.float() - zero[:, columns]) * scale[:, columns]
    extra = work - coded
    kept = ((errors == target - work) & (extra != 0))[:, back]
    extra, coded, step = (t[:, back][kept] for t in (extra, coded, scale[:, columns]))
    outliers = kept_outliers(kept, extra, coded, step, spec.largest) if outlier > 0 else None
    fitted = grid
    if not given:
        stored = [torch.stack([levels[g][i] for g in range(grid.n_groups)], 1) for i in range(3)]
        bilevel = BilevelScales(stored[0].to(torch.uint8), stored[1], stored[2], scale_bits, scale_group)
        fitted = Grid(bilevel.expand(weight.shape[0]), zero.to(torch.int32), grid.g_idx, grid.qmax, bilevel)
    info = {"percdamp": used_damp, "outlier_fraction": extra.numel() / weight.numel()}
    return QuantizedWeight(codes[:, back].contiguous(), fitted, spec, info, outliers)


def range_outliers(part: Tensor, spec: QuantSpec, importance: Tensor, threshold: Tensor) -> Tensor:
    """Leave-one-out: entries of part [out, n] without which the group's error falls by more than the threshold.

    Removing an entry inside the range changes nothing but its own error; only the smallest and the largest entry of
    a row need another fit.
    """
    everything = torch.ones_like(part, dtype=torch.bool)
    errors = _errors(part, *_range(part, everything), spec) * importance
    total, found = errors.sum(1), errors > threshold
    for extreme in (part.argmin(1, keepdim=True), part.argmax(1, keepdim=True)):
        keep = everything.scatter(1, extreme, False)
        without = (_errors(part, *_range(part, keep), spec) * importance).mul_(keep).sum(1)
        found.scatter_(1, extreme, (total - without > threshold)[:, None])
    return found


def _range(part: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest kept entry of every row, 0 included."""
    kept = part * keep
    return kept.amin(1).clamp_(max=0), kept.amax(1).clamp_(min=0)


def _errors(part: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec) -> Tensor:
    """Squared rounding errors [out, n] on the grids of the given ranges."""
    scale, zero = (t[:, None] for t in range_to_grid(lo, hi, spec))
    return (part - spec.numbers.values(part, scale, zero)).square_()


def zero_point(lo: Tensor, hi: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """The integer zero point, as float, that centres [lo, hi] on a grid of the given scale, as far as ``spec.largest``
    lets the grid be moved."""
    if spec.symmetric:
        return torch.full_like(scale, spec.numbers.middle)
    reach = torch.floor(spec.largest / scale.double()).clamp_(max=spec.qmax).to(scale.dtype)
    lowest = (spec.qmax - reach).clamp_(min=min(1, spec.qmax - 1))
    zero = torch.round((spec.qmax - (hi + lo) / scale) / 2).clamp_(lowest, reach)
    return torch.where((lo == 0) & (hi == 0), float(spec.numbers.middle), zero)


def _two_levels(
    lo: Tensor, hi: Tensor, part: Tensor, keep: Tensor, importance: Tensor, spec: QuantSpec, bits: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized scales [out] of one group: (scale, codes [out], base and step [ceil(out / rows)]).

    Of the code at or below the wanted scale and the next, the one with the lower weighted error of the kept weights.
    """
    wanted, _ = range_to_grid(lo, hi, spec)
    n_out, n_blocks = wanted.numel(), -(-wanted.numel() // rows)
    # A row without a range takes any scale: the smallest of its block, so that the others' steps stay what they were.
    empty = (lo == 0) & (hi == 0)
    padded = F.pad(wanted.masked_fill(empty, torch.inf), (0, n_blocks * rows - n_out), value=torch.inf).view(
        n_blocks, rows
    )
    base = padded.amin(1, keepdim=True).nan_to_num(posinf=1.0)
    padded = torch.where(padded.isinf(), base, padded)
    wanted, base = padded.flatten()[:n_out], base.squeeze(1)
    step = multiple_of_finest((padded.amax(1) - base) / (2**bits - 1), spec)
    small = base.half()
    exact = bool(((small.float() - base).abs() <= base / 64).all()) and bool(
        torch.isfinite(padded.amax(1).half()).all()
    )
    if exact:  # otherwise they are stored in 32 bits, as the scales of every grid are
        base, step = small, step.half()
    wide_base, wide_step = (t.float().repeat_interleave(rows)[:n_out] for t in (base, step))
    position = torch.where(wide_step > 0, (wanted - wide_base) / wide_step, 0.0)
    # Above it no zero point keeps both ends within spec.largest.
    highest = largest_scales(spec.qmax, spec.largest, wanted.device)[spec.numbers.middle]
    top = torch.where(wide_step > 0, ((highest - wide_base) / wide_step).floor(), torch.inf)
    best = best_codes = torch.empty(0)
    best_error: Tensor | None = None
    for codes in (position.floor(), position.floor() + 1):
        codes = codes.clamp_(0, 2**bits - 1)
        codes = torch.minimum(codes, top)
        codes -= (wide_base + codes * wide_step > highest).to(codes.dtype)
        scale = wide_base + codes * wide_step
        value = spec.numbers.values(part, scale[:, None], zero_point(lo, hi, scale, spec)[:, None])
        error = (part - value).square_().mul_(importance).mul_(keep).sum(1)
        better = torch.ones_like(error, dtype=torch.bool) if best_error is None else error < best_error
        best_error = error if best_error is None else torch.where(better, error, best_error)
        best = scale if best.numel() == 0 else torch.where(better, scale, best)
        best_codes = codes if best_codes.numel() == 0 else torch.where(better, codes, best_codes)
    return best, best_codes, base, step
