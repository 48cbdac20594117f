"""SpQR: GPTQ's sweep with small groups, scales quantized themselves, and sensitive weights kept as outliers."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_grid, fit_scale_zero, range_to_grid
from quant.core.linalg import damped_factor
from quant.core.outliers import kept_outliers
from quant.core.stored import largest_scales, multiple_of_finest
from quant.core.types import BilevelScales, Grid, QuantizedWeight, QuantSpec
from quant.solvers import Options, solver
from quant.solvers.gptq import feedback_rounding, gptq_bytes, gptq_flops, visiting_order


def spqr_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """As GPTQ, and at the end of the sweep the outliers are collected: 8.25 weights and the factor."""
    return max(gptq_bytes(n_out, n_in, options, group_size), 8.25 * 4 * n_out * n_in + 4.0 * n_in**2)


# Scales of two levels are more than most formats hold, also without outliers.
@solver("spqr", outliers=lambda options: True, workspace=spqr_bytes, rows_coupled=True, flops=gptq_flops)
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
    A given grid is used as it is, in one level. With act_order groups are formed in visiting order, which must be stored.
    Raises SingularGramError, see there, and ValueError for a grid with a real minimum, which two-level scales do not have.
    """
    check_levels(spec, scale_bits, scale_group)
    weight = weight.detach().float()
    stats.check()
    order = visiting_order(stats.diagonal, spec, act_order)
    upper, used_damp = damped_factor(stats.gram[order][:, order] if act_order else stats.gram, percdamp, auto_damp)
    # 1 / U_jj² of the inverse's factor; the factor holds a 1 for a column without inputs, where no error counts.
    sensitivity = upper.diagonal().square().masked_fill(stats.diagonal[order] == 0, 0.0)
    threshold = sensitivity.new_tensor(torch.inf)
    if outlier > 0:
        spread = (weight.var(0, correction=0)[order] * sensitivity).mean()
        # Weights that do not vary over the rows (a layer of one row) give no threshold, and no outliers.
        threshold = torch.where(spread > 0, outlier * spread, torch.inf)
    fit: GroupFit | None = None
    if grid is None:
        grid = fit_grid(weight, replace(spec, range="minmax"), None, order if act_order else None)
        left_out = threshold if outlier > 0 and not simplified_outliers else None
        fit = GroupFit(spec, sensitivity, left_out, scale_bits, scale_group)
    visited, target = (replace(grid, g_idx=grid.g_idx[order]), weight[:, order]) if act_order else (grid, weight)
    layer = feedback_rounding(target, upper, visited, spec, fit, block_size, threshold / sensitivity)
    back = torch.argsort(order) if act_order else slice(None)
    step, zeros = (t[:, visited.g_idx] if t.shape[1] > 1 else t for t in (layer.scale, layer.zero))
    coded = (layer.codes.float() - zeros) * step
    extra = layer.incoming - coded
    # An outlier is an entry that was left as it was, and the grid would have moved.
    kept = ((layer.residual == target - layer.incoming) & (extra != 0))[:, back]
    extra, coded, step = (t[:, back][kept] for t in (extra, coded, step.expand_as(extra)))
    outliers = kept_outliers(kept, extra, coded, step, spec.largest) if outlier > 0 else None
    if fit is not None:
        bilevel = fit.scales()
        zero = layer.zero.to(torch.int32)
        grid = Grid(bilevel.expand(weight.shape[0]), zero, grid.g_idx, grid.qmax, bilevel)
    info = {"percdamp": used_damp, "outlier_fraction": extra.numel() / weight.numel()}
    return QuantizedWeight(layer.codes[:, back].contiguous(), grid, spec, info, outliers)


def check_levels(spec: QuantSpec, scale_bits: int, scale_group: int) -> None:
    """Raise ValueError where scales of two levels cannot be those of the grid."""
    if spec.kind != "integer":
        raise ValueError(
            f"spqr's scales of two levels have integer zero points: drop --grid {spec.kind}, or use another method"
        )
    if not 1 <= scale_bits <= 8 or scale_group < 1:
        raise ValueError(f"scale_bits={scale_bits}, scale_group={scale_group}: use 1 to 8 bits and 1 or more rows")


class GroupFit:
    """Fits the grid of one group after the other, as GPTQ's sweep reaches them; scales are quantized too.

    sensitivity [in]: 1 / U_jj², in visiting order. threshold: that of the leave-one-out; None leaves nothing out of the
    range. bits, rows: of the codes of scales, and rows that share their base and step. levels: of every group so far,
    codes [out], base and step [ceil(out / rows)].
    """

    def __init__(self, spec: QuantSpec, sensitivity: Tensor, threshold: Tensor | None, bits: int, rows: int) -> None:
        self.spec, self.sensitivity, self.threshold, self.bits, self.rows = spec, sensitivity, threshold, bits, rows
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, part: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Scale and zero point [out] for the compensated weights part [out, n] of a group."""
        spec, importance = self.spec, self.sensitivity[columns]
        keep = torch.ones_like(part, dtype=torch.bool)
        if self.threshold is not None:
            keep = ~range_outliers(part, spec, importance, self.threshold)
        lo, hi = _range(part, keep)
        if spec.range == "mse":
            scale, zero = fit_scale_zero(part * keep, spec, importance * keep)
            lo, hi = -zero * scale, (spec.qmax - zero) * scale
        # First level: the scale that the range asks for. Second: numbers in few bits that stand for it.
        wanted, _ = range_to_grid(lo, hi, spec)
        wanted, base, step = self.second_level(wanted, (lo == 0) & (hi == 0))
        wide_base, wide_step = (t.float().repeat_interleave(self.rows)[: wanted.numel()] for t in (base, step))
        position = torch.where(wide_step > 0, (wanted - wide_base) / wide_step, 0.0)
        # Above it no zero point keeps both ends within spec.largest.
        highest = largest_scales(spec.qmax, spec.largest, wanted.device)[spec.numbers.middle]
        top = torch.where(wide_step > 0, ((highest - wide_base) / wide_step).floor(), torch.inf)

        def at(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Scales, their codes as they are allowed to be, and the weighted error of the kept weights, each [out]."""
            codes = torch.minimum(codes.clamp(0, 2**self.bits - 1), top)
            codes -= (wide_base + codes * wide_step > highest).to(codes.dtype)
            scale = wide_base + codes * wide_step
            value = spec.numbers.values(part, scale[:, None], zero_point(lo, hi, scale, spec)[:, None])
            return scale, codes, (part - value).square_().mul_(importance).mul_(keep).sum(1)

        # Of the code at or below the wanted scale and the next, the one with the lower error.
        below, above = at(position.floor()), at(position.floor() + 1)
        better = above[2] < below[2]
        scale, codes = (torch.where(better, second, first) for first, second in zip(below[:2], above[:2], strict=True))
        self.levels.append((codes, base, step))
        return scale, zero_point(lo, hi, scale, spec)

    def second_level(self, wanted: Tensor, empty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The wanted scales [out] again, and their base and step [ceil(out / rows)] in float16, or in float32 where that
        does not hold them.

        A row without a range (empty) takes any scale: the smallest of its block, so that the others' steps stay what
        they were.
        """
        n_blocks = -(-wanted.numel() // self.rows)
        fill = (0, n_blocks * self.rows - wanted.numel())
        blocks = F.pad(wanted.masked_fill(empty, torch.inf), fill, value=torch.inf).view(n_blocks, self.rows)
        base = blocks.amin(1).nan_to_num(posinf=1.0)
        blocks = torch.where(blocks.isinf(), base[:, None], blocks)  # [blocks, rows]
        largest, wanted = blocks.amax(1), blocks.flatten()[: wanted.numel()]
        step = multiple_of_finest((largest - base) / (2**self.bits - 1), self.spec)
        is_near = (base.half().float() - base).abs() <= base / 64
        if bool((is_near & torch.isfinite(largest.half())).all()):
            base, step = base.half(), step.half()
        return wanted, base, step

    def scales(self) -> BilevelScales:
        """The scales of all groups; the sweep comes to groups in ascending order."""
        codes, base, step = (torch.stack(tensors, 1) for tensors in zip(*self.levels, strict=True))
        return BilevelScales(codes.to(torch.uint8), base, step, self.bits, self.rows)


def range_outliers(part: Tensor, spec: QuantSpec, importance: Tensor, threshold: Tensor) -> Tensor:
    """Leave-one-out: entries of part [out, n] without which the group's error falls by more than the threshold.

    Removing an entry inside the range changes nothing but its own error; only the smallest and the largest entry of
    a row need another fit.
    """
    everything = torch.ones_like(part, dtype=torch.bool)
    errors = _errors(part, *_range(part, everything), spec) * importance
    total, left_out = errors.sum(1), errors > threshold
    for extreme in (part.argmin(1, keepdim=True), part.argmax(1, keepdim=True)):
        keep = everything.scatter(1, extreme, False)
        without = (_errors(part, *_range(part, keep), spec) * importance).mul_(keep).sum(1)
        left_out.scatter_(1, extreme, (total - without > threshold)[:, None])
    return left_out


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
