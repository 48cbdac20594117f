"""python -m quant.kernels.ahead: compile the loops of this CPU ahead, so that nobody waits for them later (numba keeps them on disk)."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

WIDTHS = (4, 3, 2, 8)  # others compile at their first product


def of_columns() -> None:
    """The solvers' loops, which compile as they are imported."""
    from quant.kernels.columns import cpu  # noqa: F401


def of_products(bits: int) -> None:
    """Products of one token, of some and of many, with groups and a zero point for each, as most checkpoints have them."""
    import torch

    from quant.core.types import Grid, QuantizedWeight, QuantSpec
    from quant.kernels.matmul.cpu_fields import MULTIPLIED
    from quant.kernels.matmul.pack import pack_weight

    spec = QuantSpec(bits, 32)
    grid = Grid(torch.ones(32, 2).half().float(), torch.zeros(32, 2), torch.arange(64) // 32, spec.qmax)
    packed = pack_weight(QuantizedWeight(torch.zeros(32, 64, dtype=torch.uint8), grid, spec))
    for tokens in (1, 8, MULTIPLIED[0] + 1):
        packed.matmul(torch.ones(tokens, 64))


def main() -> None:
    """Everything, by as many processes as there are cores."""
    started = time.perf_counter()
    with ProcessPoolExecutor(min(len(WIDTHS) + 1, os.cpu_count() or 1), get_context("spawn")) as pool:
        for work in [pool.submit(of_columns), *(pool.submit(of_products, bits) for bits in WIDTHS)]:
            work.result()
    sys.stdout.write(f"compiled for this CPU in {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
