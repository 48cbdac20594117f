"""Round to nearest: the baseline that every other method must beat."""

from __future__ import annotations

from torch import Tensor

from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.stacks import StackedStats
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.solvers import solver


@solver("rtn", starts_at_nearest=lambda options, group_size: True, stacks=lambda options: True,
        flops=lambda n_out, n_in, options: float(n_out) * n_in)  # fmt: skip
def rtn(
    weight: Tensor, stats: GramStats | StackedStats | None, spec: QuantSpec, *, grid: Grid | None = None
) -> QuantizedWeight:
    """Nearest code of every weight [out, in]; statistics are used by ``range="mse"`` only and may be None."""
    weight = weight.detach().float()
    grid = grid or fit_grid(weight, spec, None if stats is None else stats.check().importance)
    return QuantizedWeight(grid.quantize(weight), grid, spec)
