"""QuantEase: cyclic coordinate descent on the layer objective ‖(W - Ŵ)X‖² (Algorithm 2, accelerated; Algorithm 3).

The exact minimizer of column j, all rows at once, with E = W - Ŵ, Σ = X Xᵀ and C = E Σ:

    u_j = Ŵ_j + C_j / Σ_jj,      Ŵ_j <- Q(u_j)

C is kept up to date. Columns are visited in blocks of B: inside a block only the B x B tile of Σ is needed, after
it the block's changes ΔE reach the other columns by one product, C += ΔE Σ (2·out·in·B flops, the floor of the
method, and less where few entries changed; on CUDA those of several blocks at once). That is the same sequence of
coordinate updates as the column-by-column loop, `plain.plain_descent`. No inverse, no factorization, and no damping but where calibration is too small for the
layer (see `damped_gram`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_grid, refit_scale_zero
from quant.core.level_grid import refit_levels, shared, stored_levels
from quant.core.linalg import largest_eigenvalue
from quant.core.names import SUPER_COLUMNS
from quant.core.outliers import kept_outliers
from quant.core.real_grid import refit_scale_minimum
from quant.core.stacks import StackedStats, times
from quant.core.stored import stored_base, stored_scale, within_largest
from quant.core.superblocks import kind_of, refit_integers, refit_units, rescaled, units_of
from quant.core.types import Grid, Outliers, QuantizedWeight, QuantSpec, group_index
from quant.kernels.columns import ColumnBlock, inverse_diagonal, kernels
from quant.solvers import Options, solver
from quant.solvers.gptq import visiting_order

MAX_ALPHA = 2.0  # a gradient step of alpha / (2 λmax) ends no higher up to here; with the projection, up to 1
DAMPING, MOST_DAMPING = 0.1, 1.0  # times inputs over rank, and times the mean of the Gram diagonal
FACTORS, SEARCH_SWEEPS = (1.0, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15), 3


class Descent:
    """Coordinate descent in progress; columns are in visiting order.

    target [out, in]; residual = target - Ŵ; correlation = residual @ gram; codes uint8, those of the last rounding
    sweep. free [out, in] bool: entries that are not rounded. zero: where the minimum is real, what the loops take for it.
    """

    def __init__(self, target: Tensor, gram: Tensor, grid: Grid, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: use 1 or more columns")
        self.target, self.gram, self.block_size = target, gram, block_size
        self.scale, self.zero = grid.scale.clone(), grid.float_zero()
        self.minimum = None if grid.minimum is None else grid.minimum.clone()
        self.group, self.numbers = grid.g_idx, grid.numbers
        self.given = grid
        self.residual, self.correlation = torch.zeros_like(target), torch.zeros_like(target)
        self.codes = torch.empty_like(target, dtype=torch.uint8)
        self.free: Tensor | None = None
        self.kernels, self.inverse = kernels(target.device), inverse_diagonal(gram)  # of all sweeps

    def start_from(self, approximation: Tensor) -> None:
        """Begin at Ŵ [out, in] instead of at the target itself."""
        self.residual = self.target - approximation
        self.correlation = times(self.residual, self.gram)

    def sweep(self, rounding: bool) -> None:
        """Visit every column once."""
        layer = ColumnBlock(self.target, self.residual, self.correlation, self.gram, self.scale, self.zero, self.group,
                            self.numbers, self.codes, rounding, self.free, inverse=self.inverse)  # fmt: skip
        n_in, reach = self.target.shape[1], self.block_size * max(1, self.kernels.reach // self.block_size)
        for start in range(0, n_in, reach):
            self._visit(layer, slice(start, min(start + reach, n_in)))

    def _visit(self, layer: ColumnBlock, columns: slice) -> None:
        """Visit some columns in blocks. Of a block all of them hear, and the rest of the layer of all blocks at once."""
        starts, changes = range(columns.start, columns.stop, self.block_size), []
        near = columns if len(starts) > 1 else slice(None)
        for start in starts:
            block = slice(start, min(start + self.block_size, columns.stop))
            # Inside the block: u_j, Ŵ_j and codes column by column, C followed in a copy of the block's own columns [out, B].
            change = self.kernels.coordinate_descent_(layer.part(block))
            # Then C += ΔE Σ: ΔE [out, B] times the block's rows of Σ [B, in].
            self.kernels.propagate_(self.correlation[:, near], change, self.gram[..., block, near])
            changes.append(change)
        if len(changes) > 1:
            change, n_in = torch.cat(changes, 1), self.target.shape[1]
            for rest in (slice(0, columns.start), slice(columns.stop, n_in)):
                if rest.start < rest.stop:
                    self.kernels.propagate_(self.correlation[:, rest], change, self.gram[..., columns, rest])

    def move_target(self, change: Tensor) -> None:
        """Add change [out, in] to the target; Ŵ stays."""
        self.target = self.target + change
        self.residual += change
        self.kernels.propagate_(self.correlation, change, self.gram)

    def grid(self, g_idx: Tensor) -> Grid:
        """The grid as it is now, for columns in these groups."""
        zero = self.given.zero if self.minimum is not None else self.zero.to(torch.int32)
        return replace(self.given, scale=self.scale, zero=zero, g_idx=g_idx, bilevel=None, minimum=self.minimum)

    def refit(self, spec: QuantSpec) -> None:
        """Scale and zero point, or minimum, of every group in closed form for the codes as they are; never raises the
        objective."""
        if spec.super_kind is not None:
            self._refit_superblocks(spec)
            return
        for g, columns in enumerate(self.columns):
            if self.minimum is not None:
                self._refit_line(g, columns, self.minimum, spec)
                continue
            offsets = self.numbers.steps(self.codes[:, columns], self.zero[:, g, None])  # [out, n]: Ŵ / scale
            if self.free is not None:
                offsets.masked_fill_(self.free[:, columns], 0)  # free entries do not scale with the grid
            before = offsets * self.scale[:, g, None]
            rows = self.gram[..., columns, :]  # [n, in]
            within, correlation = rows[..., columns], self.correlation[:, columns]
            shift = torch.zeros_like(before[:, 0])
            if spec.level_kind is not None:
                self.scale[:, g] = refit_levels(offsets, self.scale[:, g], within, correlation, spec)
            else:
                self.scale[:, g], shift = refit_scale_zero(
                    offsets, self.scale[:, g], self.zero[:, g], within, correlation,
                    spec=spec, symmetric=spec.symmetric or self.free is not None,
                )  # fmt: skip
            self.zero[:, g] += shift
            # E = W - Ŵ grows by what Ŵ lost, and C = E Σ with it.
            change = before - (offsets - shift[:, None]) * self.scale[:, g, None]
            self.residual[:, columns] += change
            self.kernels.propagate_(self.correlation, change, rows)

    @cached_property
    def columns(self) -> list[slice | Tensor]:
        """Where the columns of every group are: side by side they are views of what they are of, and nothing is copied."""
        group = self.group.cpu()  # once: for each group the host would wait for the device
        places = [(group == g).nonzero().squeeze(1) for g in range(self.scale.shape[1])]
        bounds = [(int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0) for own in places]
        return [
            slice(first, end) if end - first == len(own) else own.to(self.group.device)
            for own, (first, end) in zip(places, bounds, strict=True)
        ]

    def _refit_line(self, g: int, columns: slice | Tensor, minimum: Tensor, spec: QuantSpec) -> None:
        """The same for scale and minimum of group g, which has these columns."""
        codes, rows = self.codes[:, columns].float(), self.gram[..., columns, :]  # [out, n], [n, in]
        free = None if self.free is None else self.free[:, columns]
        scale, lowest = self.scale[:, g].clone(), minimum[:, g].clone()
        self.scale[:, g], minimum[:, g] = refit_scale_minimum(
            codes, scale, lowest, rows[..., columns], self.correlation[:, columns], spec=spec, free=free
        )
        self.zero[:, g] = -minimum[:, g] / self.scale[:, g]
        change = codes * (scale - self.scale[:, g])[:, None] + (lowest - minimum[:, g])[:, None]
        if free is not None:
            change.masked_fill_(free, 0)  # free entries do not move with the grid
        self.residual[:, columns] += change
        self.kernels.propagate_(self.correlation, change, rows)

    def _refit_superblocks(self, spec: QuantSpec) -> None:
        """Of every super-block the float16 numbers that its parts share, then the integers of each part. Raises ValueError where
        columns are not in order."""
        if not torch.equal(self.group, group_index(len(self.group), spec.group_size, self.group.device)):
            raise ValueError(f"{spec.kind} holds columns in order: leave act_order out")
        kind, units = kind_of(spec), units_of(self.grid(self.group), spec)
        parts = SUPER_COLUMNS // kind.part
        d, a = units.d, units.a
        e, b = (torch.zeros_like(d), torch.zeros_like(a)) if units.e is None or units.b is None else (units.e, units.b)
        for s in range(d.shape[1]):
            groups = slice(s * parts, (s + 1) * parts)
            columns = slice(s * SUPER_COLUMNS, (s + 1) * SUPER_COLUMNS)
            codes = self._counted(columns)
            each_a, each_b = (t[:, s].repeat_interleave(kind.part, 1) for t in (a, b))
            d[:, s], e[:, s] = refit_units(
                codes, d[:, s].clone(), each_a, e[:, s].clone(), each_b,
                self.gram[columns, columns], self.correlation[:, columns],
            )  # fmt: skip
            self._move_grid(groups, columns, d[:, s, None] * a[:, s], -e[:, s, None] * b[:, s])
            for p in range(parts):
                own = slice(columns.start + p * kind.part, columns.start + (p + 1) * kind.part)
                a[:, s, p], b[:, s, p] = refit_integers(
                    self._counted(own), d[:, s], a[:, s, p], e[:, s] if kind.minima else None, b[:, s, p],
                    self.gram[own, own], self.correlation[:, own], kind.most,
                )  # fmt: skip
                one = slice(groups.start + p, groups.start + p + 1)
                self._move_grid(one, own, (d[:, s] * a[:, s, p])[:, None], (-e[:, s] * b[:, s, p])[:, None])

    def _counted(self, columns: slice) -> Tensor:
        """Codes of some columns as floats, counted from the zero points where there are those."""
        codes = self.codes[:, columns].float()
        return codes if self.minimum is not None else codes - self.zero[:, self.group[columns]]

    def _move_grid(self, groups: slice, columns: slice, scale: Tensor, minimum: Tensor) -> None:
        """Give groups other scales, and minima if they have any; their codes stay."""
        counted, group = self._counted(columns), self.group[columns] - groups.start
        change = counted * (self.scale[:, groups] - scale)[:, group]  # E = W - Ŵ grows by what Ŵ loses
        if self.minimum is not None:
            change += (self.minimum[:, groups] - minimum)[:, group]
            self.minimum[:, groups], self.zero[:, groups] = minimum, -minimum / scale
        self.scale[:, groups] = scale
        self.residual[:, columns] += change
        self.kernels.propagate_(self.correlation, change, self.gram[columns])


def is_rounding_sweep(sweep: int, num_iter: int) -> bool:
    """Whether a sweep rounds. Sweeps 1, 4, ..., 25 store the unrounded minimizer (released code's schedule)."""
    return sweep % 3 != 1 or sweep == num_iter - 1 or sweep > 25


def search_scales(target: Tensor, gram: Tensor, grid: Grid, spec: QuantSpec, block_size: int) -> Grid:
    """The grid with each row's scales times the factor whose descent of SEARCH_SWEEPS sweeps ends lowest."""
    best = torch.full_like(target[:, 0], torch.inf)
    found = grid
    for factor in FACTORS:
        trial = scaled_by(grid, factor, spec)
        descent = Descent(target, gram, trial, block_size)
        for sweep in range(SEARCH_SWEEPS):
            descent.sweep(is_rounding_sweep(sweep, SEARCH_SWEEPS))
        objective = shared((descent.residual * descent.correlation).sum(1), spec, Tensor.sum)
        better = objective < best
        best = torch.where(better, objective, best)
        found = replace(found, scale=torch.where(better[:, None], trial.scale, found.scale))
        if trial.minimum is not None and found.minimum is not None:
            found = replace(found, minimum=torch.where(better[:, None], trial.minimum, found.minimum))
    return found


def scaled_by(grid: Grid, factor: float, spec: QuantSpec) -> Grid:
    """The grid with its scales times a factor: integer zero points stay, and else the middle of the grid."""
    if spec.super_kind is not None:
        return rescaled(grid, factor, spec)
    if spec.level_kind is not None:
        return replace(grid, scale=stored_levels(grid.scale * factor, spec))
    wanted = stored_scale(grid.scale * factor, spec)
    if grid.minimum is None:
        return replace(grid, scale=within_largest(wanted, grid.zero, spec))
    middle = grid.minimum + grid.scale * (grid.qmax / 2)
    scale, minimum = stored_base(wanted, middle - wanted * (grid.qmax / 2), spec)
    return replace(grid, scale=scale, minimum=minimum)


def damped_gram(stats: GramStats | StackedStats) -> tuple[Tensor, float]:
    """Σ, and λ: where the inputs vary in fewer directions than there are columns, Σ + λ·mean(diag Σ)·I; else Σ itself and 0.

    Nothing holds the weights where no input was seen, and the descent spends them there: from 64 tokens it leaves 7.0
    times the error of rounding to nearest on other text, in a layer of 384 inputs. With λ = DAMPING · in / rank (the
    fewer, the more the unseen directions count) it is 0.64 times. docs/footguns.md has the table.
    """
    if isinstance(stats, StackedStats):
        grams, used = zip(*map(damped_gram, stats.layers), strict=True)
        return (torch.stack(grams), max(used)) if any(used) else (stats.gram, 0.0)
    n_in, gram = stats.diagonal.numel(), stats.gram
    if stats.rank == n_in:
        return gram, 0.0
    damping = min(MOST_DAMPING, DAMPING * n_in / stats.rank)
    gram = gram.clone()
    gram.diagonal().add_(damping * stats.diagonal.mean())
    return gram, damping


def starts_plainly(options: Options, group_size: int) -> bool:
    """Whether the grid is fitted to the whole weight, in groups of columns side by side."""
    return not keeps_outliers(options) and (not options["act_order"] or options["static_groups"] or group_size == -1)


def keeps_outliers(options: Options) -> bool:
    """Whether a share of the weights stays in full precision."""
    return bool(options["outlier"] > 0)


def outlier_bits(options: Options) -> float:
    """Bits a weight for outliers: value and index of each, or the values of whole columns."""
    return float(options["outlier"]) * (16 if options["structure_outlier"] else 32)


def outlier_label(options: Options) -> str:
    """The share of the weights that are outliers, and whether they are whole columns."""
    columns = " columns" if options["structure_outlier"] else ""
    return f"+{100 * options['outlier']:g}%{columns}" if keeps_outliers(options) else ""


def quantease_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """Descent: weight, target, residual, correlation, codes; a searched or refitted grid doubles that, outliers take more,
    and with them or a refitted grid go two Gram matrices. act_order: weight and Gram matrix while they are permuted."""
    area, square = 4.0 * n_out * n_in, 4.0 * n_in**2
    outlier, refit, ordered = keeps_outliers(options), bool(options["refit_grid"]), bool(options["act_order"])
    weights = 14 if outlier else 10 if refit or options["search_grid"] else 5
    return max(weights * area + (2 * (outlier or refit) + ordered) * square, 2 * (area + square) * ordered)


def stacks(options: Options) -> bool:
    """Whether layers of a stack can be solved at once: in the order of their columns, without outliers."""
    return not (options["act_order"] or keeps_outliers(options))


def quantease_flops(n_out: int, n_in: int, options: Options) -> float:
    """Of every sweep."""
    return 2.0 * options["num_iter"] * n_out * n_in**2


@solver(
    "quantease",
    flops=quantease_flops,
    stacks=stacks,
    outliers=keeps_outliers,
    workspace=quantease_bytes,
    starts_at_nearest=starts_plainly,
    outlier_bits=outlier_bits,
    label=outlier_label,
)
def quantease(
    weight: Tensor,
    stats: GramStats | StackedStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    init: QuantizedWeight | None = None,
    num_iter: int = 30,
    relax: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    search_grid: bool = False,
    refit_grid: bool = False,
    outlier: float = 0.0,
    structure_outlier: bool = False,
    alpha: float = 1.0,
    outlier_metric: str = "auto",
    block_size: int = 128,
) -> QuantizedWeight:
    """Coordinate descent from W itself, or from ``init`` (on its grid), for weight [out, in].

    The grid is fitted to the original weights and stays fixed, unless refit_grid refits it to the codes between
    rounding sweeps. search_grid multiplies the scales of each row by the factor of FACTORS under which a short descent
    ends lowest. act_order visits columns by decreasing Gram diagonal and forms groups in that order unless
    static_groups. relax=False rounds in every sweep. Columns with a zero Gram diagonal are rounded to nearest.

    outlier > 0 keeps that share of the weights (or of the columns, structure_outlier) in full precision (Algorithm
    3): between sweeps the outliers take a projected gradient step of alpha / (2 λmax(Σ)); in the last third of the
    sweeps their places are fixed and their values descend exactly, as coordinates that are not rounded.
    Raises ValueError for options that leave nothing to do.
    """
    if num_iter < 1:
        raise ValueError(f"num_iter={num_iter}: coordinate descent needs at least one sweep")
    weight = weight.detach().float()
    stats.check()
    # From here on columns are in visiting order, but for ``weight`` and the grid that is fitted to it.
    order = visiting_order(stats.diagonal, spec, act_order)
    back = torch.argsort(order)
    gram, damping = damped_gram(stats)
    target, gram = weight[:, order].contiguous(), gram[order][:, order] if act_order else gram
    outliers = choose_outliers(target, gram, outlier, structure_outlier, alpha, outlier_metric)
    inliers = target if outliers is None else target - outliers.values
    if grid is None:
        formed = order if act_order and not static_groups else None
        grid = (
            init.grid
            if init
            else fit_grid(weight if outliers is None else inliers[:, back], spec, stats.importance, formed)
        )
    visited = replace(grid, g_idx=grid.g_idx[order])
    if search_grid and init is None:
        visited = search_scales(inliers, gram, visited, spec, block_size)
    descent = Descent(target, gram, visited, block_size)
    if init is not None:
        descent.start_from(init.dequantize()[:, order])
    descent.target = inliers
    descend(descent, target, outliers, num_iter, relax, spec if refit_grid else None)
    fitted = descent.grid(grid.g_idx)
    kept = None if outliers is None else outliers.collect(descent, back, spec)
    info = {"num_iter": num_iter} | ({"damping": damping} if damping else {})
    return QuantizedWeight(descent.codes[:, back].contiguous(), fitted, spec, info, kept)


def descend(
    descent: Descent,
    target: Tensor,
    outliers: OutlierSet | None,
    num_iter: int,
    relax: bool,
    refitted: QuantSpec | None,
) -> None:
    """All sweeps, and what happens between them. target: with the outliers in it. refitted: what grids are refitted for;
    None leaves them as they are."""
    for sweep in range(num_iter):
        rounding = is_rounding_sweep(sweep, num_iter) or not relax
        if outliers is not None and sweep == num_iter - num_iter // 3:
            descent.target, descent.free = target, outliers.chosen  # their places are final: Ŵ takes them in
        descent.sweep(rounding)
        if refitted is not None and rounding and sweep + 1 < num_iter:
            descent.refit(refitted)
        if outliers is not None and descent.free is None:
            outliers.step_(descent)


def choose_outliers(
    target: Tensor, gram: Tensor, share: float, structured: bool, alpha: float, metric: str
) -> OutlierSet | None:
    """The outliers to begin with, None for a share of 0. Raises ValueError for options that have no meaning."""
    if not 0 <= share < 1:
        raise ValueError(f"outlier={share:g}: a share of the weights, 0 or more and below 1")
    if not 0 < alpha <= MAX_ALPHA:
        raise ValueError(f"alpha={alpha:g}: a step above 0, at most {MAX_ALPHA:g} (beyond it the outliers diverge)")
    if metric not in ("weight", "gram", "auto"):
        raise ValueError(f"outlier_metric={metric!r}: use weight, gram or auto")
    if metric == "auto":
        metric = "gram" if structured else "weight"
    return OutlierSet(target, gram, share, structured, alpha, metric) if share > 0 else None


class OutlierSet:
    """H of Algorithm 3: the entries (or columns) of the weight [out, in] that stay in full precision.

    Raises ValueError for a share that leaves nothing to quantize.
    """

    def __init__(self, weight: Tensor, gram: Tensor, share: float, structured: bool, alpha: float, metric: str) -> None:
        whole = weight.shape[1] if structured else weight.numel()
        self.count, self.structured = max(1, round(share * whole)), structured
        if self.count >= whole:
            what = "columns" if structured else "weights"
            raise ValueError(f"outlier={share:g} makes all {whole} {what} outliers and leaves nothing to quantize")
        if not structured and 2 * self.count >= whole > 2:  # 32 bits each, with their places
            raise ValueError(
                f"outlier={share:g}: these outliers alone take the bits of the whole layer and leave nothing to quantize; use a share below 0.5"
            )
        # In the metric of the Gram diagonal d, columns count by what they do to the output; the plain one is published.
        d = gram.diagonal() if metric == "gram" else torch.ones_like(gram.diagonal())
        self.metric = d.clamp_min(1e-6 * max(float(d.mean()), torch.finfo(torch.float32).tiny))
        root = self.metric.sqrt()
        bound = largest_eigenvalue(gram / root / root[:, None])
        self.step = alpha / (2 * bound * self.metric) if bound > 0 else torch.zeros_like(self.metric)  # all inputs zero
        self.chosen = self._largest(weight)
        self.values = weight * self.chosen

    def _largest(self, matrix: Tensor) -> Tensor:
        """Which entries are in the largest ``count`` ones (or in the ``count`` columns of largest norm)."""
        mask = torch.zeros_like(matrix, dtype=torch.bool)
        if self.structured:
            mask[:, (matrix.square().sum(0) * self.metric).topk(self.count).indices] = True
        else:
            mask.view(-1)[(matrix.abs() * self.metric.sqrt()).flatten().topk(self.count).indices] = True
        return mask

    def step_(self, descent: Descent) -> None:
        """H <- P(H + step·(W - Ŵ - H)Σ), and the target of the descent with it."""
        moved = self.values + self.step * descent.correlation  # the gradient of the objective in H is -2 (W - Ŵ - H) Σ
        self.chosen = self._largest(moved)
        moved *= self.chosen  # P: all but the largest become zero
        descent.move_target(self.values - moved)
        self.values = moved

    def collect(self, descent: Descent, back: Tensor, spec: QuantSpec) -> Outliers:
        """What must be added to the values of the codes, in the layer's own order of columns."""
        group = descent.group
        coded = descent.grid(group).dequantize(descent.codes)
        # Target minus residual is Ŵ. Free entries of Ŵ are the outliers; before the last third they stand beside it, in H.
        extra = descent.target - descent.residual - coded + (0 if descent.free is not None else self.values)
        chosen = self.chosen[:, back]
        extra, coded, step = (t[:, back][chosen] for t in (extra, coded, descent.scale[:, group]))
        return kept_outliers(chosen, extra, coded, step, spec.largest, whole_columns=self.structured)
