"""QuantEase: cyclic coordinate descent on the layer objective ‖(W - Ŵ)X‖² (Algorithm 2, accelerated).

The exact minimizer of column j, all rows at once, with E = W - Ŵ and Σ = X Xᵀ:

    u_j = Ŵ_j + (E Σ)_j / Σ_jj,      Ŵ_j <- Q(u_j)

Columns are visited in blocks of B. Before a block, its columns of E Σ come from one matrix product
(2·out·in·B flops, the floor of the method); inside, only the B x B tile of Σ is needed. That is the same
sequence of coordinate updates as the column-by-column loop. No inverse, no factorization, no damping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.grid import fit_grid
from quant.core.registry import solver
from quant.core.stats import LayerStats
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.blocks import coordinate_descent_block_


def rounds(sweep: int, num_iter: int) -> bool:
    """Whether a sweep rounds. Sweeps 1, 4, ..., 25 store the unrounded minimizer (released code's schedule)."""
    return sweep % 3 != 1 or sweep == num_iter - 1 or sweep > 25


@solver("quantease")
def quantease(
    weight: Tensor,
    stats: LayerStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    init: QuantizedWeight | None = None,
    num_iter: int = 30,
    relax: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Coordinate descent from W itself, or from ``init`` (on its grid), for weight [out, in].

    The grid is fitted to the original weights and stays fixed. act_order visits columns by decreasing
    Gram diagonal and forms groups in that order unless static_groups. relax=False rounds in every sweep.
    Columns with a zero Gram diagonal are rounded to nearest.
    """
    if num_iter < 1:
        raise ValueError(f"num_iter={num_iter}: coordinate descent needs at least one sweep")
    weight = weight.detach().float()
    stats.check()
    order = stats.order() if act_order else None
    if grid is None:
        grid = init.grid if init else fit_grid(weight, spec, stats.diagonal, None if static_groups else order)
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    target = weight.T[order].contiguous()  # [in, out], in visiting order
    gram = stats.gram[order][:, order] if act_order else stats.gram
    group = grid.g_idx[order]
    scale, zero = grid.scale.T.contiguous(), grid.zero.float().T.contiguous()  # [G, out]
    residual = target - init.dequantize().T[order] if init else torch.zeros_like(target)
    codes = torch.empty_like(target, dtype=torch.uint8)

    for sweep in range(num_iter):
        rounding = rounds(sweep, num_iter) or not relax
        for start in range(0, target.shape[0], block_size):
            block = slice(start, start + block_size)
            # In the first sweep from W itself, the residual of every later column is still zero.
            known = slice(0, start) if sweep == 0 and init is None else slice(None)
            coordinate_descent_block_(
                residual[block],
                gram[block, known] @ residual[known],
                target[block],
                gram[block, block],
                scale,
                zero,
                group[block],
                grid.qmax,
                codes[block] if rounding else None,
            )
    codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return QuantizedWeight(codes.T.contiguous(), grid, spec, {"num_iter": num_iter})
