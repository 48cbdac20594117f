"""As many threads for compiled loops on a CPU as torch has, whose own number stays what it was."""

from __future__ import annotations

import threading

import numba
import torch

_told = threading.local()  # numba keeps the number by thread, and takes microseconds to set it


def share_threads() -> None:
    """Tell numba torch's number of threads."""
    n = torch.get_num_threads()
    if getattr(_told, "threads", None) != n:
        numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        torch.set_num_threads(n)
        _told.threads = n


def thread_counts() -> tuple[int, int]:
    """Threads of torch's products, and of compiled loops."""
    share_threads()
    return torch.get_num_threads(), numba.get_num_threads()


# The first call starts numba's threads, and numba then tells OpenMP, which torch shares, to use all cores: torch would compute
# with as many from here on, whatever it was told.
share_threads()
