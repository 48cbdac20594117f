"""GPTQ: column-by-column rounding with error feedback through the inverse Gram matrix (GPTQ, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.grid import fit_grid, fit_scale_zero
from quant.core.linalg import damped_inverse_cholesky
from quant.core.registry import solver
from quant.core.stats import LayerStats
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.blocks import gptq_block_


@solver("gptq")
def gptq(
    weight: Tensor,
    stats: LayerStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    percdamp: float = 0.01,
    auto_damp: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Round weight [out, in] left to right; each column's error e = (w_j - Q(w_j)) / U_jj is taken out of the rest.

    U is the upper Cholesky factor of (Σ + percdamp·mean(diag Σ)·I)⁻¹. Group grids are fitted to the
    compensated weights when the sweep reaches the group, unless static_groups fits them to the original
    weights. act_order visits columns by decreasing Gram diagonal. Raises SingularGramError, see there.
    Deviation: a dead column keeps its nearest code (the released code sets it to zero).
    """
    weight = weight.detach().float()
    n_out, n_in = weight.shape
    stats.check()
    order = stats.order() if act_order else torch.arange(n_in, device=weight.device)
    gram = stats.gram[order][:, order] if act_order else stats.gram
    upper, used_damp = damped_inverse_cholesky(gram, percdamp, auto_damp)
    dynamic = grid is None and not static_groups and spec.group_size != -1
    if grid is None:
        grid = fit_grid(weight, spec, stats.diagonal, order if act_order and not static_groups else None)
    work = weight.T[order].contiguous()  # [in, out], in visiting order
    importance, group = stats.diagonal[order], grid.g_idx[order]
    scale, zero = grid.scale.T.contiguous(), grid.zero.float().T.contiguous()  # [G, out]
    codes = torch.empty_like(work, dtype=torch.uint8)
    # Blocks are whole groups, so that a group's weights are fully compensated when its grid is fitted.
    size = spec.group_size if dynamic else block_size
    block_size = size * max(1, block_size // size)

    for start in range(0, n_in, block_size):
        end = min(start + block_size, n_in)
        errors = torch.empty_like(work[start:end])
        for first in range(start, end, size):
            part = slice(first, min(first + size, end))
            if dynamic:
                scale[group[first]], fitted_zero = fit_scale_zero(work[part].T, spec, importance[part])
                zero[group[first]] = fitted_zero.float()
            inside = slice(part.start - start, part.stop - start)
            gptq_block_(
                work[part],
                upper[part, part],
                scale,
                zero,
                group[part],
                grid.qmax,
                codes[part],
                errors[inside],
            )
            work[part.stop : end].addmm_(upper[part, part.stop : end].T, errors[inside], alpha=-1)
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)

    codes = torch.empty_like(codes).index_copy_(0, order, codes)
    fitted = Grid(scale.T.contiguous(), zero.T.to(torch.int32).contiguous(), grid.g_idx, grid.qmax)
    return QuantizedWeight(codes.T.contiguous(), fitted, spec, {"percdamp": used_damp})
