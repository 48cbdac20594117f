"""The loops over rows compiled with numba: rows in parallel, float32, a row at a time in the nearest cache.

Rows longer than LONG are cut, so that threads share them and their sums stay exact; what is summed is in an order of its own, whatever
the number of threads.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from quant.kernels.threads import share_threads

LONG = 1024
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "parallel": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz"},  # not of numbers that are none: a loss that is not finite must stay so
}


@njit(**_OPTIONS)
def _quantize(x, scale, zero, qmax, out):  # noqa: ANN001, ANN202
    for r in prange(x.shape[0]):
        s, z, row, values = scale[r], zero[r], x[r], out[r]
        for i in range(row.shape[0]):
            code = np.rint(row[i] / s) + z
            code = np.float32(0) if code < 0 else code
            code = qmax if code > qmax else code
            values[i] = (code - z) * s


@njit(**_OPTIONS)
def _quantize_gradient(x, scale, zero, qmax, gradient, of_x, of_scale):  # noqa: ANN001, ANN202
    for r in prange(x.shape[0]):
        s, z, row, given, passed = scale[r], zero[r], x[r], gradient[r], of_x[r]
        total = np.float32(0)
        for i in range(row.shape[0]):
            ratio = row[i] / s
            rounded = np.rint(ratio) + z
            code = np.float32(0) if rounded < 0 else rounded
            code = qmax if code > qmax else code
            is_inside = code == rounded
            passed[i] = given[i] if is_inside else np.float32(0)
            total += given[i] * ((code - z) - (ratio if is_inside else np.float32(0)))
        of_scale[r] = total


@njit(**_OPTIONS)
def _span_gradient(x, low, high, of_low, of_high, of_x):  # noqa: ANN001, ANN202
    for r in prange(x.shape[0]):
        row, passed, lowest, highest = x[r], of_x[r], low[r], high[r]
        n_low = n_high = np.int32(0)
        for i in range(row.shape[0]):
            n_low += np.int32(row[i] == lowest)
            n_high += np.int32(row[i] == highest)
        share_low = of_low[r] / np.float32(max(n_low, 1))
        share_high = of_high[r] / np.float32(max(n_high, 1))
        for i in range(row.shape[0]):
            own = share_low if row[i] == lowest else np.float32(0)
            passed[i] = own + (share_high if row[i] == highest else np.float32(0))


def quantize(x: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """See the reference: the same numbers."""
    share_threads()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = _parts(x)
    _quantize(_rows(x, parts), *(_ends(end, x, parts) for end in (scale, zero)), np.float32(qmax), _rows(out, parts))
    return out


def quantize_gradient(x: Tensor, scale: Tensor, zero: Tensor, qmax: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference."""
    share_threads()
    of_x, parts = torch.empty_like(x, memory_format=torch.contiguous_format), _parts(x)
    of_scale = torch.empty(x.shape[:-1].numel() * parts)
    _quantize_gradient(
        _rows(x, parts), *(_ends(end, x, parts) for end in (scale, zero)), np.float32(qmax), _rows(gradient, parts),
        _rows(of_x, parts), of_scale.numpy(),
    )  # fmt: skip
    whole = of_scale.view(*x.shape[:-1], parts).sum(-1, keepdim=True, dtype=torch.float64)
    return of_x, whole.sum_to_size(scale.shape).float()


def span_gradient(x: Tensor, low: Tensor, high: Tensor, of_low: Tensor, of_high: Tensor) -> Tensor:
    """See the reference."""
    share_threads()
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    _span_gradient(_rows(x, 1), *(_ends(end, x, 1) for end in (low, high, of_low, of_high)), _rows(of_x, 1))
    return of_x


def _parts(x: Tensor) -> int:
    """How many pieces of equal length a row is cut into: the fewest that are no longer than LONG; one where there are no such."""
    n, fewest = x.shape[-1], -(-x.shape[-1] // LONG)
    return next((parts for parts in range(fewest, 8 * fewest) if n % parts == 0), 1) if n > LONG else 1


def _rows(x: Tensor, parts: int) -> np.ndarray:
    return x.detach().reshape(x.shape[:-1].numel() * parts, x.shape[-1] // parts).contiguous().numpy()


def _ends(numbers: Tensor, x: Tensor, parts: int) -> np.ndarray:
    """One number for every piece of a row of x."""
    return numbers.detach().expand(*x.shape[:-1], parts).reshape(-1).contiguous().numpy()
