"""What compiles for seconds at its first use on a CPU, used once: numba keeps it on disk."""

from __future__ import annotations

import torch

from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.matmul.cpu_fields import MULTIPLIED
from quant.kernels.matmul.pack import pack_weight

WIDTHS = (4, 3, 2, 8)  # others compile at their first product
TOKENS = (1, 8, MULTIPLIED[0] + 1)  # one, some and many: a variant each


def of_columns() -> None:
    """The solvers' loops, which compile as they are imported."""
    from quant.kernels.columns import cpu  # noqa: F401


def of_products(bits: int) -> None:
    """Products with groups and a zero point for each, as most checkpoints have them."""
    spec = QuantSpec(bits, 32)
    grid = Grid(torch.ones(32, 2), torch.zeros(32, 2), torch.arange(64) // 32, spec.qmax)
    packed = pack_weight(QuantizedWeight(torch.zeros(32, 64, dtype=torch.uint8), grid, spec))
    for tokens in TOKENS:
        packed.matmul(torch.ones(tokens, 64))
