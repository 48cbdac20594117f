"""What compiles or is measured at its first use on a CPU, used once: it is kept on disk."""

from __future__ import annotations

import numpy as np
import torch

from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.matmul.choice import CANDIDATES, up_to
from quant.kernels.matmul.cpu import BitPlanes
from quant.kernels.matmul.cpu_bytes import ByteTiles
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.one_token import one_token
from quant.kernels.matmul.pack import layout_of, pack_weight
from quant.kernels.rounding import FakeQuantize, Span
from quant.kernels.steps import loops

WIDTHS = (4, 3, 2, 8)  # others compile at their first product
TOKENS = (1, CANDIDATES[0], CANDIDATES[-1] + 1)  # one, some and many: a variant each, and none hangs on a measurement


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


def of_choices() -> None:
    """Which way products of several tokens take (`choice`), with one thread and with as many as torch has; to be called where
    nothing else runs."""
    layout, threads = layout_of(torch.device("cpu")), torch.get_num_threads()
    assert isinstance(layout, BitPlanes | FieldTiles)  # those of a CPU
    for n in sorted({1, threads}):
        torch.set_num_threads(n)
        for bits in WIDTHS:
            up_to(layout, bits)
    torch.set_num_threads(threads)


def of_steps() -> None:
    """The operations between products."""
    loops.run(np.zeros((0, loops.WIDTH), np.uint64))
