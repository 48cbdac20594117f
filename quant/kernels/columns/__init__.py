"""Inner loops over a block of columns, for the solvers: torch (the reference), numba (CPU) and Triton (CUDA).

`kernels(device)` chooses; `describe` says which, for the manifest.
"""

from __future__ import annotations

import logging
import subprocess

import torch

from quant.kernels.columns.reference import ColumnBlock, Kernels, TorchKernels, inverse_diagonal

__all__ = ["ColumnBlock", "Kernels", "TorchKernels", "describe", "inverse_diagonal", "kernels"]
log = logging.getLogger(__name__)
# What an import of Triton, its compiler, a driver or a wrong answer of the trial raises.
UNUSABLE = (ImportError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError, ArithmeticError,
            AttributeError, LookupError, TypeError, ValueError)  # fmt: skip
_chosen: dict[str, Kernels] = {}


def kernels(device: torch.device) -> Kernels:
    """The fastest implementation that works on a device; chosen once a process and device.

    A Triton that cannot be imported or does not compile is reported in one warning that names what is used instead.
    """
    named = str(device) if device.index else device.type  # the first has no number, or 0
    if named not in _chosen:
        _chosen[named] = _choose(device)
    return _chosen[named]


def describe(device: torch.device) -> str:
    """The implementation of a device, and why it is not a faster one where that is so."""
    chosen = kernels(device)
    reason = getattr(chosen, "instead", "")
    return f"{chosen.name}: {reason}" if reason else chosen.name


def _choose(device: torch.device) -> Kernels:
    if device.type == "cpu":
        from quant.kernels.columns.cpu import NumbaKernels

        return NumbaKernels()
    if device.type == "cuda":
        try:
            from quant.kernels.columns.cuda import TritonKernels

            return TritonKernels().check(device)
        except UNUSABLE as error:
            reason = f"Triton kernels are not usable ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            log.warning("%s; using torch", reason)
            return TorchKernels(reason)
    return TorchKernels()
