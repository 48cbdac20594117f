"""What compiles for seconds at its first use on a CPU, used once: numba keeps it on disk."""

from __future__ import annotations

import numpy as np
import torch

from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.matmul.cpu_bytes import ByteTiles
from quant.kernels.matmul.cpu_fields import MULTIPLIED, FieldTiles
from quant.kernels.matmul.one_token import one_token
from quant.kernels.matmul.pack import pack_weight
from quant.kernels.rounding import FakeQuantize, Span
from quant.kernels.steps import loops

WIDTHS = (4, 3, 2, 8)  # others compile at their first product
TOKENS = (1, 8, MULTIPLIED[0] + 1)  # one, some and many: a variant each


def of_columns() -> None:
    """The solvers' loops, which compile as they are imported."""
    from quant.kernels.columns import cpu  # noqa: F401


def of_products(bits: int) -> None:
    """Products with groups and a zero point for each, as most checkpoints have them."""
    spec = QuantSpec(bits, 32)
    grid = Grid(torch.ones(32, 2), torch.zeros(32, 2), torch.arange(64) // 32, spec.qmax)
    answer = QuantizedWeight(torch.zeros(32, 64, dtype=torch.uint8), grid, spec)
    packed = pack_weight(answer)
    for tokens in TOKENS:
        packed.matmul(torch.ones(tokens, 64))
    layouts: tuple[FieldTiles, ...] = (FieldTiles(), ByteTiles()) if ByteTiles.runs_here() else (FieldTiles(),)
    for layout in layouts:  # as steps of a text take them
        one_token(pack_weight(answer, layout=layout), torch.ones(64), torch.empty(32))


def of_rounding() -> None:
    """Fake quantization, forward and backward."""
    x = torch.ones(2, 8, requires_grad=True)
    low, high = Span.apply(x)
    FakeQuantize.apply(x, low + high, low, 15).sum().backward()


def of_steps() -> None:
    """The operations between products."""
    loops.run(np.zeros((0, loops.WIDTH), np.uint64))
