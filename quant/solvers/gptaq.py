"""GPTAQ: GPTQ that also takes up what the quantized model's inputs differ from the original's (arXiv 2504.02692).

With ΔX = X - X̂, H = X̂X̂ᵀ + λI and H⁻¹ = UᵀU, U upper, column j of the weight as it is when the sweep reaches it, c_j, is
rounded, and the columns k > j behind it take up two errors (Algorithm 1):

    w_k <- w_k - (c_j - ŵ_j) U_jk / U_jj + α c_j P_jk,        P = ((ΔX X̂ᵀ Uᵀ) ⊙ strictly upper) U

The first is GPTQ's. The second is what the columns k > j can best do about c_j ΔX_j: P_j,F = ΔX_j X̂_Fᵀ (H_FF)⁻¹ for F behind j.
α = 1 is the paper's equation and overshoots at 2 bits; GPTQModel takes 0.25, which is the default here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_for, fit_grid
from quant.core.linalg import damped_factor
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.solvers import Options, solver
from quant.solvers.gptq import fits_on_the_way, gptq_bytes, keeps_first_grid, visiting_order


def gptaq_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """What GPTQ takes, with two more square matrices: the inverse factor and P."""
    return gptq_bytes(n_out, n_in, options, group_size) + 8.0 * n_in**2


@solver("gptaq", workspace=gptaq_bytes, starts_at_nearest=keeps_first_grid, uses_cross=True)
def gptaq(
    weight: Tensor,
    stats: GramStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    percdamp: float = 0.01,
    auto_damp: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    gptaq_alpha: float = 0.25,
    block_size: int = 128,
) -> QuantizedWeight:
    """Round weight [out, in] left to right; the next columns take up the errors so far, and those of the inputs.

    Group grids are fitted when the sweep reaches the group, to its columns as they are then. act_order, static_groups,
    percdamp: as in `gptq`. gptaq_alpha: α above. Raises ValueError where the statistics hold no cross term, and what
    `damped_factor` does.
    """
    weight = weight.detach().float()
    if (cross := stats.check().cross) is None:
        raise ValueError("the statistics hold no cross term with the original model's inputs, which gptaq takes up")
    order = visiting_order(stats.diagonal, spec, act_order)
    gram, cross = (matrix[order][:, order] for matrix in (stats.gram, cross))
    upper, used_damp = damped_factor(gram, percdamp, auto_damp)
    upper = torch.linalg.solve_triangular(upper, torch.eye(len(order), device=upper.device), upper=True)  # U = V⁻¹
    pull = gptaq_alpha * ((cross - gram) @ upper.T).triu_(1) @ upper  # αP
    fits = fits_on_the_way(spec, static_groups) and grid is None
    if grid is None:
        grid = fit_grid(weight, spec, stats.diagonal, order if act_order and not static_groups else None)
    visited = replace(grid, scale=grid.scale.clone(), zero=grid.zero.clone(), g_idx=grid.g_idx[order])
    if grid.minimum is not None:
        visited = replace(visited, minimum=grid.minimum.clone())
    codes = sweep(weight[:, order], upper, pull, visited, spec, stats.diagonal[order] if fits else None, block_size)
    fitted = replace(visited, g_idx=grid.g_idx)
    return QuantizedWeight(codes[:, torch.argsort(order)].contiguous(), fitted, spec, {"percdamp": used_damp})


def sweep(
    weight: Tensor, upper: Tensor, pull: Tensor, grid: Grid, spec: QuantSpec, importance: Tensor | None, block_size: int
) -> Tensor:
    """Codes uint8 [out, in] of weight [out, in] in visiting order. importance [in]: fit the grid of every group, in place,
    when it is reached; None: it stays. Columns of a block are brought up to date one by one, those behind it at its end."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: use 1 or more columns")
    work, codes = weight.clone(), torch.empty_like(weight, dtype=torch.uint8)
    n_in, size = weight.shape[1], weight.shape[1] // grid.n_groups
    block_size = size * max(1, block_size // size) if importance is not None else block_size
    for start in range(0, n_in, block_size):
        end = min(start + block_size, n_in)
        errors = torch.empty_like(work[:, start:end])  # (c_j - ŵ_j) / U_jj
        for j in range(start, end):
            g = int(grid.g_idx[j])
            if importance is not None and j % size == 0:
                group = slice(j, j + size)
                base = grid.zero if grid.minimum is None else grid.minimum
                grid.scale[:, g], base[:, g] = fit_for(spec)(work[:, group], spec, importance[group])
            column, own = work[:, j], grid.of_group(g)
            codes[:, j] = own.quantize(column[:, None]).squeeze(1)
            errors[:, j - start] = (column - own.dequantize(codes[:, j, None]).squeeze(1)) / upper[j, j]
            rest = slice(j + 1, end)
            work[:, rest] += torch.outer(column, pull[j, rest]) - torch.outer(errors[:, j - start], upper[j, rest])
        work[:, end:] += work[:, start:end] @ pull[start:end, end:] - errors @ upper[start:end, end:]
    return codes
