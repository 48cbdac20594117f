"""Slow, obvious versions of the solvers, written from the papers' equations: the truth in the tests. The plainest two are
in `quant.solvers.plain`; grids are fitted by a formula of this file's own."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.types import Grid, QuantSpec
from quant.solvers.plain import plain_descent, plain_gptq


def make_stats(x: Tensor) -> GramStats:
    """Statistics of inputs x [tokens, in], which are those of the original model too."""
    stats = GramStats(x.shape[1])
    stats.update(x)
    stats.cross = stats.gram.clone()
    return stats


def inputs(n_in: int, tokens: int, seed: int = 0, correlation: float = 0.7) -> Tensor:
    """Correlated inputs with a few loud columns, as layers of language models see them."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.eye(n_in) + correlation * torch.randn(n_in, n_in, generator=g) / n_in**0.5
    loud = 1 + 9 * (torch.rand(n_in, generator=g) < 0.05)
    return torch.randn(tokens, n_in, generator=g) @ mixing * loud


def weights(n_out: int, n_in: int, seed: int = 1) -> Tensor:
    """Gaussian weights."""
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))


def problem(n_out: int = 24, n_in: int = 64, tokens: int = 256) -> tuple[Tensor, GramStats]:
    """A weight and the statistics of its inputs."""
    return weights(n_out, n_in), make_stats(inputs(n_in, tokens))


def objective64(error: Tensor, gram: Tensor) -> float:
    """tr(E Σ Eᵀ) in float64 throughout."""
    e, g = error.double(), gram.double()
    return float(torch.einsum("oi,ij,oj->", e, g, e))


def round_column(u: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes and values of one column."""
    code = torch.clamp(torch.round(u / scale) + zero, 0, qmax)
    return code, scale * (code - zero)


def range_grid(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale, a half-precision number, and integer zero point of the grid over [lo, hi]; zero points are 1 or above."""
    levels = spec.levels or 2**spec.bits
    span = 2 * torch.maximum(-lo, hi) if spec.symmetric else hi - lo
    scale = (span / (levels - 1)).half().float()
    zero = torch.full_like(scale, levels // 2) if spec.symmetric else torch.round(-lo / scale)
    if not spec.symmetric and levels > 2:
        scale = torch.where(zero < 1, (hi / (levels - 2)).half().float(), scale)
        zero = zero.clamp(1, levels - 1)
    empty = lo == hi  # a row of zeros
    return torch.where(empty, 1.0, scale), torch.where(empty, float(levels // 2), zero)


def slow_grid(part: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The grid of every row of part [out, n]: over its range, or over that of the least error, both ends shrunk together
    and then either one moved by itself."""
    part = part.float()
    lo, hi = part.amin(-1).clamp(max=0), part.amax(-1).clamp(min=0)
    if spec.range == "minmax":
        return range_grid(lo, hi, spec)
    weight = torch.ones_like(part[0]) if importance is None else importance
    power = 2.4 if (spec.levels or 2**spec.bits) <= 5 else 2.0

    def best_of(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        errors = []
        for low, high in ends:
            scale, zero = (t[:, None] for t in range_grid(low, high, spec))
            _, value = round_column(part, scale, zero, (spec.levels or 2**spec.bits) - 1)
            errors.append(((part - value).abs().double() ** power * weight).sum(1))
        best = torch.stack(errors).argmin(0)[None]
        low, high = (torch.stack(side).gather(0, best)[0] for side in zip(*ends, strict=True))
        return low, high

    low, high = best_of([(lo * (1 - 0.01 * i), hi * (1 - 0.01 * i)) for i in range(80)])
    if not spec.symmetric:
        factors = [1 + 0.05 * i for i in range(-10, 11) if i]
        moved, _ = best_of([(low, high), *((torch.maximum(low * f, lo), high) for f in factors)])
        low, high = best_of([(moved, high), *((moved, torch.minimum(high * f, hi)) for f in factors)])
    return range_grid(low, high, spec)


def naive_coordinate_descent(weight: Tensor, gram: Tensor, grid: Grid, order: Tensor, rounding: list[bool]) -> Tensor:
    """Codes after len(rounding) sweeps over the columns in that order."""
    scale, zero = (t.double()[:, grid.g_idx[order]] for t in (grid.scale, grid.zero))
    codes, _ = plain_descent(weight[:, order], gram[order][:, order], scale, zero, grid.qmax + 1, rounding)
    return codes[:, torch.argsort(order)].to(torch.uint8)


def damped(gram: Tensor, percdamp: float) -> Tensor:
    """The Gram matrix with GPTQ's damping, float64."""
    return gram.double() + percdamp * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def naive_gptq(
    weight: Tensor, gram: Tensor, spec: QuantSpec, percdamp: float, order: Tensor, grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """Codes and values of GPTQ over the columns in that order, on the grid given. None: group grids are fitted to the
    compensated weights when their first column is reached."""
    importance, levels = gram.diagonal()[order].float(), spec.levels or 2**spec.bits

    def fit(part: Tensor, first: int) -> tuple[Tensor, Tensor]:
        if grid is not None:
            return grid.scale.double()[:, grid.g_idx[order[first]]], grid.zero.double()[:, grid.g_idx[order[first]]]
        scale, zero = slow_grid(part, spec, importance[first : first + part.shape[1]])
        return scale.double(), zero.double()

    size = spec.group_size if grid is None else 1  # a grid that is there is asked column by column
    codes, values = plain_gptq(weight[:, order], gram[order][:, order], percdamp, levels, size, fit)
    back = torch.argsort(order)
    return codes[:, back].to(torch.uint8), values[:, back]


def naive_outlier_descent(
    weight: Tensor, gram: Tensor, grid: Grid, count: int, structured: bool, sweeps: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """QuantEase's Algorithm 3 with rounding sweeps and step alpha / (2 λmax): (codes, outliers float64 [out, in])."""
    w, sigma = weight.double(), gram.double()
    scale, zero = grid.scale.double()[:, grid.g_idx], grid.zero.double()[:, grid.g_idx]
    step = alpha / (2 * float(torch.linalg.eigvalsh(sigma)[-1]))

    def project(h: Tensor) -> Tensor:
        score = h.square().sum(0).expand_as(h) if structured else h.abs()
        keep = count * (h.shape[0] if structured else 1)
        mask = torch.zeros(h.numel(), dtype=torch.bool)
        mask[score.flatten().sort(descending=True, stable=True).indices[:keep]] = True
        return h * mask.view_as(h)

    outliers = project(w)
    current, codes = w - outliers, torch.zeros_like(w)
    for _ in range(sweeps):
        for j in range(w.shape[1]):
            u = current[:, j] + (w - outliers - current) @ sigma[:, j] / sigma[j, j]
            codes[:, j], current[:, j] = round_column(u, scale[:, j], zero[:, j], grid.qmax)
        outliers = project(outliers - step * (current + outliers - w) @ sigma)
    return codes.to(torch.uint8), outliers


def naive_leave_one_out(part: Tensor, spec: QuantSpec, importance: Tensor, threshold: float) -> Tensor:
    """Every entry of part [out, n] in turn is left out of the range; by how much does the group's error fall?"""
    left_out = torch.zeros_like(part, dtype=torch.bool)

    def error(row: Tensor, kept: Tensor) -> float:
        values = torch.cat([row[kept], row.new_zeros(1)])  # the range includes 0
        scale, zero = slow_grid(values[None], QuantSpec(spec.bits, symmetric=spec.symmetric))
        _, rounded = round_column(row, scale, zero, spec.qmax)
        return float(((row - rounded).double().square() * importance)[kept].sum())

    everything = torch.ones(part.shape[1], dtype=torch.bool)
    for r, row in enumerate(part):
        for i in range(part.shape[1]):
            rest = everything.clone()
            rest[i] = False
            left_out[r, i] = error(row, everything) - error(row, rest) > threshold
    return left_out


def naive_two_level_grid(part: Tensor, keep: Tensor, importance: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out] of one group: in every block of 16 rows the scales are base + code * step with codes
    of 3 bits; a row takes the neighbour of the scale it wants that leaves the lower error of the kept weights."""
    wanted = [
        slow_grid(torch.cat([row[k], row.new_zeros(1)])[None], spec)[0][0] for row, k in zip(part, keep, strict=True)
    ]
    scales, zeros = torch.zeros(len(part)), torch.zeros(len(part))
    for first in range(0, len(part), 16):
        rows = range(first, min(first + 16, len(part)))
        ranged = [float(wanted[r]) for r in rows if bool((part[r] * keep[r]).any())]
        base = torch.tensor(min(ranged)).half().float()
        step = torch.tensor((max(ranged) - min(ranged)) / 7).half().float()
        for r in rows:
            kept = torch.cat([part[r][keep[r]], part.new_zeros(1)])
            lo, hi, lowest = float(kept.min()), float(kept.max()), float("inf")
            near = torch.floor((wanted[r] - base) / step) if lo < hi else torch.tensor(0.0)
            for code in (near, near + 1):
                scale = base + code.clamp(0, 7) * step
                zero = torch.round((spec.qmax - (hi + lo) / scale) / 2).clamp(1, spec.qmax)
                zero = zero if lo < hi else torch.tensor(float((spec.qmax + 1) // 2))
                _, value = round_column(part[r], scale, zero, spec.qmax)
                error = float(((part[r] - value).square() * importance)[keep[r]].sum())
                if error < lowest:
                    lowest, scales[r], zeros[r] = error, scale, zero
    return scales, zeros


def naive_spqr_sweep(
    weight: Tensor, upper: Tensor, grid: Grid, relative: float, fitted: QuantSpec | None = None
) -> tuple[Tensor, Tensor]:
    """SpQR's sweep: (codes, what the outliers add), float64 throughout. On the grid given; with fitted, that grid's
    scales and zero points are overwritten by those fitted when the sweep reaches a group, its outliers left out."""
    w, u = weight.double().clone(), upper.double()
    threshold = relative * float((w.var(0, correction=0) / u.diagonal().square()).mean())
    codes, outliers = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(w.shape[1]):
        if fitted is not None and j % fitted.group_size == 0:
            columns = slice(j, j + fitted.group_size)
            part, importance = w[:, columns].float(), u.diagonal()[columns].float() ** -2
            keep = ~naive_leave_one_out(part, fitted, importance, threshold)
            scale, zero = naive_two_level_grid(part, keep, importance, fitted)
            grid.scale[:, grid.g_idx[j]], grid.zero[:, grid.g_idx[j]] = scale, zero.int()
        scale, zero = (t.double()[:, grid.g_idx[j]] for t in (grid.scale, grid.zero))
        codes[:, j], value = round_column(w[:, j], scale, zero, grid.qmax)
        error = (w[:, j] - value) / u[j, j]
        kept = error.square() > threshold
        outliers[kept, j] = (w[:, j] - value)[kept]
        error[kept] = 0
        w[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
    return codes.to(torch.uint8), outliers
