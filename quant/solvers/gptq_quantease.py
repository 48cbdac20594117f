"""GPTQ, then QuantEase: GPTQ's codes, improved by coordinate descent towards the original weights."""

from __future__ import annotations

from torch import Tensor

from quant.core.gram import GramStats
from quant.core.linalg import objective
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.solvers import Options, solver
from quant.solvers.gptq import gptq, gptq_bytes, gptq_flops, keeps_first_grid
from quant.solvers.quantease import damped_gram, quantease, quantease_flops


def both_bytes(n_out: int, n_in: int, options: Options, group_size: int) -> float:
    """The larger of GPTQ and the descent, which holds GPTQ's answer too: 7 weights; with a refitted grid 10 and two
    Gram matrices."""
    area, square = 4.0 * n_out * n_in, 4.0 * n_in**2
    descent = 10 * area + 2 * square if options["refit_grid"] else 7 * area
    return max(gptq_bytes(n_out, n_in, options, group_size), descent)


def both_flops(n_out: int, n_in: int, options: Options) -> float:
    """Of both."""
    return gptq_flops(n_out, n_in, options) + quantease_flops(n_out, n_in, options)


@solver("gptq_quantease", workspace=both_bytes, starts_at_nearest=keeps_first_grid, flops=both_flops)
def gptq_quantease(
    weight: Tensor,
    stats: GramStats,
    spec: QuantSpec,
    *,
    grid: Grid | None = None,
    num_iter: int = 30,
    percdamp: float = 0.01,
    auto_damp: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    group_aware: bool = False,
    refit_grid: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Sweeps that round every time, from GPTQ's codes on GPTQ's grid (which refit_grid refits), for weight [out, in].

    The target is the original weight. Each step lowers the objective or leaves it; GPTQ's own answer is returned
    where arithmetic has left it the better one. Raises what `gptq` raises.
    """
    start = gptq(
        weight, stats, spec, grid=grid, percdamp=percdamp, auto_damp=auto_damp, act_order=act_order,
        static_groups=static_groups, group_aware=group_aware, block_size=block_size,
    )  # fmt: skip
    answer = quantease(
        weight, stats, spec, init=start, num_iter=num_iter, relax=False, refit_grid=refit_grid, block_size=block_size
    )
    info, gram = {**start.info, **answer.info}, damped_gram(stats)[0]
    before, after = (objective(weight.detach().float() - a.dequantize(), gram) for a in (start, answer))
    best = answer if after <= before else start
    return QuantizedWeight(best.codes, best.grid, spec, info)
