"""Slow, obvious float64 versions of the solvers, written from the papers' equations: the truth in the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_scale_zero
from quant.core.types import Grid, QuantSpec


def make_stats(x: Tensor) -> GramStats:
    """Statistics of inputs x [tokens, in]."""
    stats = GramStats(x.shape[1])
    stats.update(x)
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


def objective64(error: Tensor, gram: Tensor) -> float:
    """tr(E Σ Eᵀ) in float64 throughout."""
    e, g = error.double(), gram.double()
    return float(torch.einsum("oi,ij,oj->", e, g, e))


def round_column(u: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes and values of one column."""
    code = torch.clamp(torch.round(u / scale) + zero, 0, qmax)
    return code, scale * (code - zero)


def naive_coordinate_descent(weight: Tensor, gram: Tensor, grid: Grid, order: Tensor, rounding: list[bool]) -> Tensor:
    """Codes after len(rounding) sweeps; the minimizer of each coordinate from the full Gram matrix, nothing reused."""
    w, sigma = weight.double(), gram.double()
    scale, zero = grid.scale.double()[:, grid.g_idx], grid.zero.double()[:, grid.g_idx]
    current, codes = w.clone(), torch.zeros_like(w)
    for rounds_now in rounding:
        for j in order.tolist():
            others = current @ sigma[:, j] - current[:, j] * sigma[j, j]
            u = (w @ sigma[:, j] - others) / sigma[j, j] if sigma[j, j] > 0 else current[:, j]
            if rounds_now:
                codes[:, j], current[:, j] = round_column(u, scale[:, j], zero[:, j], grid.qmax)
            else:
                current[:, j] = u
    return codes.to(torch.uint8)


def damped(gram: Tensor, percdamp: float) -> Tensor:
    """The Gram matrix with GPTQ's damping, float64."""
    return gram.double() + percdamp * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def naive_gptq(
    weight: Tensor, gram: Tensor, spec: QuantSpec, percdamp: float, order: Tensor, grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """OBQ in a fixed order: after each column the inverse of the remaining Gram matrix is formed explicitly.

    grid None: group grids are fitted to the compensated weights when their first column is reached.
    Returns codes and values in the original column order.
    """
    n_in = weight.shape[1]
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h += percdamp * h.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    h[dead, dead] = 1.0
    h, w = h[order][:, order], weight.double()[:, order].clone()
    importance = gram.diagonal()[order]
    codes, values = torch.zeros_like(w), torch.zeros_like(w)
    size = n_in if spec.group_size == -1 else spec.group_size
    for j in range(n_in):
        if grid is not None:
            scale, zero = (t.double()[:, grid.g_idx[order[j]]] for t in (grid.scale, grid.zero))
        elif j % size == 0:
            fitted = fit_scale_zero(w[:, j : j + size].float(), spec, importance[j : j + size])
            scale, zero = (t.double() for t in fitted)
        codes[:, j], values[:, j] = round_column(w[:, j], scale, zero, spec.qmax)
        inverse = torch.linalg.inv(h[j:, j:])
        error = (w[:, j] - values[:, j]) / inverse[0, 0]
        w[:, j:] -= torch.outer(error, inverse[0])
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
    found = torch.zeros_like(part, dtype=torch.bool)

    def error(row: Tensor, kept: Tensor) -> float:
        values = torch.cat([row[kept], row.new_zeros(1)])  # the range includes 0
        scale, zero = fit_scale_zero(values, QuantSpec(spec.bits, symmetric=spec.symmetric))
        _, rounded = round_column(row, scale, zero.float(), spec.qmax)
        return float(((row - rounded).double().square() * importance)[kept].sum())

    everything = torch.ones(part.shape[1], dtype=torch.bool)
    for r, row in enumerate(part):
        for i in range(part.shape[1]):
            rest = everything.clone()
            rest[i] = False
            found[r, i] = error(row, everything) - error(row, rest) > threshold
    return found


def naive_two_level_grid(part: Tensor, keep: Tensor, importance: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out] of one group: in every block of 16 rows the scales are base + code * step with codes
    of 3 bits; a row takes the neighbour of the scale it wants that leaves the lower error of the kept weights."""
    wanted = [fit_scale_zero(torch.cat([row[k], row.new_zeros(1)]), spec)[0] for row, k in zip(part, keep, strict=True)]
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
