"""GPTQ: column-by-column rounding; later columns take up the errors of earlier ones (GPTQ, Algorithm 1).

`plain.plain_gptq` is the same method in a few lines, by explicit inverses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_for, fit_grid
from quant.core.linalg import damped_factor
from quant.core.stacks import StackedStats, add_times_
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.columns import ColumnBlock, kernels
from quant.solvers import Options, solver

Fit = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # weights [out, n] of a group, its columns -> scale, zero [out]


def gptq_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """Factorization: the weight, a permuted copy of the Gram matrix and the factor. Sweep: weight, work, errors, codes and
    the factor. A column order takes another Gram matrix in the first and another weight in the second."""
    area, square = 4.0 * n_out * n_in, 4.0 * n_in**2
    ordered = bool(options["act_order"] or options.get("group_aware"))
    return max(area + (2 + ordered) * square, (3.25 + ordered) * area + square)


def keeps_first_grid(options: Options, group_size: int) -> bool:
    """Whether the grid is fitted to the original weights, before the sweep, in groups of columns side by side."""
    return bool(options["static_groups"]) or group_size == -1


def in_given_order(options: Options) -> bool:
    """Whether columns are visited as they stand, which layers of a stack have in common."""
    return not (options["act_order"] or options.get("group_aware"))


def gptq_flops(n_out: int, n_in: int, options: Options) -> float:
    """One factorization, and the products by which blocks of columns reach those behind them."""
    return n_in**3 / 3 + float(n_out) * n_in**2


@solver("gptq", workspace=gptq_bytes, starts_at_nearest=keeps_first_grid, stacks=in_given_order, flops=gptq_flops)
def gptq(
    weight: Tensor,
    stats: GramStats | StackedStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    percdamp: float = 0.01,
    auto_damp: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    group_aware: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Round weight [out, in] left to right; the errors of the columns so far are taken up by the next ones.

    With Σ + percdamp·mean(diag Σ)·I = V Vᵀ, V upper triangular, column k is rounded at w_k + Σ_{j<k} (w_j - ŵ_j)
    V_jk / V_kk. That is GPTQ's answer (there w_k -= e_j U_jk with the factor U of the inverse) from one factorization
    and no inverse (QuIP shows that its LDLQ equals GPTQ). Group grids are fitted to the
    compensated weights when the sweep reaches the group, unless static_groups fits them to the original
    weights, as those of super-blocks always are. act_order visits columns by decreasing Gram diagonal and forms groups in that order (checkpoints must
    then store the order); with group_aware, whole groups by decreasing sum of their diagonal and columns by
    decreasing diagonal inside, so that column i stays in group i // group_size. Raises SingularGramError, see there.
    Deviation: a dead column keeps its nearest code (the released code sets it to zero).
    """
    weight = weight.detach().float()
    stats.check()
    ordered = act_order or group_aware
    order = visiting_order(stats.diagonal, spec, act_order, group_aware)
    gram = stats.gram[order][:, order] if ordered else stats.gram
    upper, used_damp = damped_factor(gram, percdamp, auto_damp)
    del gram
    fits_groups = fits_on_the_way(spec, static_groups) and grid is None
    if grid is None:
        grid = fit_grid(weight, spec, stats.importance, order if act_order and not static_groups else None)
    visited = replace(grid, g_idx=grid.g_idx[order]) if ordered else grid
    importance = stats.importance[..., order] if ordered else stats.importance
    target = weight[:, order] if ordered else weight
    minimum = None if grid.minimum is None else grid.minimum.clone()
    fit = group_fit(spec, importance, visited.g_idx, minimum) if fits_groups else None
    layer = feedback_rounding(target, upper, visited, spec, fit, block_size)
    if minimum is not None:
        fitted = Grid.real(layer.scale, minimum, grid.g_idx, grid.qmax)
    else:
        fitted = replace(grid, scale=layer.scale, zero=layer.zero.to(torch.int32), bilevel=None)
    codes = layer.codes[:, torch.argsort(order)].contiguous() if ordered else layer.codes
    return QuantizedWeight(codes, fitted, spec, {"percdamp": used_damp})


def fits_on_the_way(spec: QuantSpec, static_groups: bool) -> bool:
    """Whether the grid of a group is fitted when the sweep reaches it: not where several groups share numbers."""
    return not static_groups and spec.group_size != -1 and spec.super_kind is None


def group_fit(spec: QuantSpec, importance: Tensor, group: Tensor, minimum: Tensor | None) -> Fit:
    """Fits the grid of a group. importance [in], or of every row [out, in], and group [in]: Gram diagonal and group of every
    column in visiting order.
    minimum [out, G]: of real grids, receives what is fitted; the zeros returned are then what the sweep takes for it."""
    groups = (
        [] if minimum is None else group.tolist()
    )  # once: each number by itself would make the host wait for the device

    def fit(part: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        scale, lowest = fit_for(spec)(part, spec, importance[..., columns])
        if minimum is None:
            return scale, lowest
        minimum[:, groups[columns.start]] = lowest
        return scale, -lowest / scale

    return fit


def visiting_order(diagonal: Tensor, spec: QuantSpec, act_order: bool, group_aware: bool = False) -> Tensor:
    """The order [in] in which columns are visited. Raises ValueError for two orders at once."""
    if act_order and group_aware:
        raise ValueError("act_order and group_aware are two orders of the columns: give one of them")
    n_in = diagonal.shape[-1]
    if not (act_order or group_aware):
        return torch.arange(n_in, device=diagonal.device)
    if act_order or spec.group_size == -1:
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(spec.n_groups(n_in), -1)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    columns = inside + torch.arange(0, n_in, groups.shape[1], device=diagonal.device)[:, None]
    return columns[torch.argsort(groups.sum(1), descending=True, stable=True)].flatten()


def feedback_rounding(
    weight: Tensor,
    upper: Tensor,
    grid: Grid,
    spec: QuantSpec,
    fit: Fit | None,
    block_size: int,
    outlier_above: Tensor | None = None,
) -> ColumnBlock:
    """GPTQ's sweep over weight [out, in] in visiting order, whose groups are contiguous if ``fit`` is given.

    upper: V of the damped Gram matrix, of a stack [parts, in, in]; consumed. fit: called when the sweep reaches a group, with its compensated weights;
    without it ``grid`` stays as it is. outlier_above float32 [in]: see `ColumnBlock`. Returns the whole layer: its codes,
    scales and zero points, ``incoming``, the weights at which columns were rounded, and ``residual``, the weight minus
    what is kept.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: use 1 or more columns")
    work, n_in = weight.clone(memory_format=torch.contiguous_format), weight.shape[1]
    # V_jk / V_kk, [in, in]: what column k takes of column j's error
    feedback = upper.div_(upper.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-2))
    scale, zero, group = grid.scale.clone(), grid.float_zero(), grid.g_idx
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    kernel = kernels(work.device)
    layer = ColumnBlock(
        weight, errors, work, feedback, scale, zero, group, grid.numbers, codes, outlier_above=outlier_above
    )
    # A group's weights are fully compensated when its grid is fitted. Blocks are as many groups as fit into block_size, each a
    # part, or of larger groups a piece, the only part of its block:
    #
    #     |<------- block ------->|<---------------- rest --------------->|
    #     | part | part |  part   |
    #        └─ its errors ──^ at once to the rest of the block
    #     └─ all errors of the block ──^ in one product to the rest of the layer
    size = n_in // grid.n_groups if fit is not None else block_size
    groups = group.tolist() if fit is not None else []
    for parts in blocks_of(n_in, size, block_size):
        start, end = parts[0].start, parts[-1].stop
        for part in parts:
            if fit is not None and part.start % size == 0:
                own, g = slice(part.start, part.start + size), groups[part.start]
                best = weight[:, own]
                if own.start > 0:
                    best = compensate(best, work[:, own], feedback[..., own, own])
                scale[:, g], zero[:, g] = fit(best, own)
            kernel.gptq_(layer.part(part))  # writes codes and errors of the part
            if part.stop < end:
                add_times_(work[:, part.stop : end], errors[:, part], feedback[..., part, part.stop : end])
        if end < n_in:
            add_times_(work[:, end:], errors[:, start:end], feedback[..., start:end, end:])
    return layer


def blocks_of(n_in: int, size: int, block_size: int) -> Iterator[list[slice]]:
    """The columns in blocks of at most block_size, each in parts: groups of ``size`` columns, or one piece of a larger group."""
    if size > block_size:
        for first in range(0, n_in, size):
            stop = min(first + size, n_in)
            yield from ([slice(start, min(start + block_size, stop))] for start in range(first, stop, block_size))
        return
    whole = size * (block_size // size)
    for start in range(0, n_in, whole):
        end = min(start + whole, n_in)
        yield [slice(first, min(first + size, end)) for first in range(start, end, size)]


def compensate(weight: Tensor, work: Tensor, feedback: Tensor) -> Tensor:
    """The best values [out, n] of a group's columns given the rounded columns before it, none of the group's rounded.

    ``work`` holds the weights plus the feedback of earlier columns alone; a column also takes up what the columns
    between change, and does so here as if they were not rounded: weight + (work - weight) · feedback⁻¹.
    """
    unit = torch.eye(feedback.shape[-1], device=feedback.device).expand_as(feedback)
    inverse = torch.linalg.solve_triangular(feedback, unit, upper=True, unitriangular=True)
    best = weight.clone(memory_format=torch.contiguous_format)
    add_times_(best, work - weight, inverse)
    return best
