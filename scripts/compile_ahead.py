"""Compile the loops of this CPU ahead, and measure which way packed products take, so that nobody waits for it later (both are kept
on disk): `make venv` does.

python -m scripts.compile_ahead
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from quant.kernels.ahead import WIDTHS, of_choices, of_columns, of_products, of_rounding, of_steps


def main() -> None:
    """Loops by as many processes as there are cores; then, alone, what is measured."""
    started = time.perf_counter()
    with ProcessPoolExecutor(min(len(WIDTHS) + 3, os.cpu_count() or 1), get_context("spawn")) as pool:
        works = [pool.submit(loops) for loops in (of_columns, of_steps, of_rounding)]
        for work in [*works, *(pool.submit(of_products, bits) for bits in WIDTHS)]:
            work.result()
    of_choices()
    sys.stdout.write(f"compiled for this CPU in {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
