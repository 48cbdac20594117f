"""Qronos: every column is rounded where it best makes up for all errors so far, the inputs' among them (arXiv 2505.11695).

For a row w with the original's outputs wX, Qronos alternates (section 3, equations 4 and 5)

    q_t = argmin over levels q of ‖wX - Σ_{j<t} q_j X̂_j - q X̂_t - Σ_{j>t} w_j X̂_j‖
    (w_{t+1}, ..., w_n) = argmin ‖wX - Σ_{j≤t} q_j X̂_j - Σ_{j>t} w_j X̂_j‖

From the second column on, w_t is at the optimum already, and its nearest level is taken: that is GPTQ's sweep for the
corrected target T = CĤ⁻¹. Only the first column is rounded while the others are still those of w:
u_1 = w_1 + (C_1 - (wĤ)_1) / Ĥ_11. So Qronos is one step of coordinate descent, and GPTQ on T behind it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.linalg import damped_factor
from quant.core.target import Correction, corrected
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.solvers import Options, solver
from quant.solvers.gptq import feedback_rounding, gptq_bytes, visiting_order


def qronos_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """What GPTQ takes, or the correction: the target, and three square matrices."""
    return max(gptq_bytes(n_out, n_in, options, group_size), 12.0 * n_out * n_in + 12.0 * n_in**2)


@solver("qronos", workspace=qronos_bytes, starts_at_nearest=lambda options, group_size: True, uses_cross=True)
def qronos(
    weight: Tensor,
    stats: GramStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    percdamp: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Round weight [out, in] left to right, on a grid that is fitted to the weight before.

    percdamp: λ over the mean of the Gram diagonal, on both sides (the paper takes a share of the largest eigenvalue).
    act_order: columns by decreasing Gram diagonal, in groups of columns side by side all the same. Raises ValueError
    where the statistics hold no cross term, and SingularGramError.
    """
    weight = weight.detach().float()
    grid = grid or fit_grid(weight, spec, stats.check().diagonal)
    target, damped = corrected(weight, stats, Correction(1.0, 0.0, percdamp))
    order = visiting_order(stats.diagonal, spec, act_order)
    gram = damped.gram[order][:, order]
    upper, _ = damped_factor(gram, 0.0)
    target = target[:, order]
    # The first column: (C - wĤ)_1 = ((T - w)(Ĥ + λI))_1, since both sides are damped.
    first = weight[:, order[0]]
    if float(stats.diagonal[order[0]]) > 0:
        first = first + ((target - weight[:, order]) @ gram[:, 0]) / gram[0, 0]
    visited = replace(grid, g_idx=grid.g_idx[order])
    own = visited.of_group(int(visited.g_idx[0]))
    first = own.dequantize(own.quantize(first[:, None])).squeeze(1)
    # The others' optimum behind it, in which the first column stands at its level and leaves GPTQ no error:
    # t_F - (t_1 - q_1) H⁻¹_1F / H⁻¹_11, with H⁻¹_1F / H⁻¹_11 = U_1F / U_11 and U the inverse of the factor.
    one = torch.zeros(1, len(order), device=upper.device)
    one[0, 0] = 1.0
    row = torch.linalg.solve_triangular(upper, one, upper=True, left=False)  # U_1
    target = target - torch.outer(target[:, 0] - first, row[0] / row[0, 0])
    target[:, 0] = first
    layer = feedback_rounding(target, upper, visited, spec, None, block_size)
    return QuantizedWeight(layer.codes[:, torch.argsort(order)].contiguous(), grid, spec, {"percdamp": percdamp})
