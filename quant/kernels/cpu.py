"""The block loops compiled with numba: parallel over tiles of rows, vectorized along a tile.

A tile's slice of the block ([B, TILE] floats) and the B x B matrix stay in the cache of its core. Arguments are
those of the torch versions in blocks.py.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

TILE = 64


@njit(parallel=True, cache=True, error_model="numpy")
def _coordinate_descent(residual, correlation, weight, gram, inverse, scale, zero, group, qmax, codes, rounding):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    n_columns, n_rows = weight.shape
    for tile in prange((n_rows + TILE - 1) // TILE):
        first, last = tile * TILE, min(n_rows, (tile + 1) * TILE)
        change = np.empty(TILE, np.float32)
        for j in range(n_columns):
            g, inv = group[j], inverse[j]
            for o in range(first, last):
                u = weight[j, o] - residual[j, o] + correlation[j, o] * inv
                if rounding:
                    code = np.rint(u / scale[g, o]) + zero[g, o]
                    code = min(max(code, np.float32(0)), qmax)
                    codes[j, o] = np.uint8(code)
                    u = (code - zero[g, o]) * scale[g, o]
                new = weight[j, o] - u
                change[o - first] = new - residual[j, o]
                residual[j, o] = new
            for k in range(j + 1, n_columns):
                factor = gram[j, k]
                for o in range(first, last):
                    correlation[k, o] += factor * change[o - first]


@njit(parallel=True, cache=True, error_model="numpy")
def _gptq(weight, upper, scale, zero, group, qmax, codes, errors):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    n_columns, n_rows = weight.shape
    for tile in prange((n_rows + TILE - 1) // TILE):
        first, last = tile * TILE, min(n_rows, (tile + 1) * TILE)
        for j in range(n_columns):
            g, diagonal = group[j], upper[j, j]
            for o in range(first, last):
                code = np.rint(weight[j, o] / scale[g, o]) + zero[g, o]
                code = min(max(code, np.float32(0)), qmax)
                codes[j, o] = np.uint8(code)
                errors[j, o] = (weight[j, o] - (code - zero[g, o]) * scale[g, o]) / diagonal
            for k in range(j + 1, n_columns):
                factor = upper[j, k]
                for o in range(first, last):
                    weight[k, o] -= factor * errors[j, o]


def _share_threads() -> None:
    """As many threads as torch was given."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def coordinate_descent_cpu_(
    residual: Tensor,
    correlation: Tensor,
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    qmax: int,
    codes: Tensor | None,
) -> None:
    """`blocks.coordinate_descent_torch_` for float32 tensors on the CPU."""
    from quant.kernels.blocks import inverse_diagonal

    _share_threads()
    unused = np.empty((0, 0), np.uint8)
    _coordinate_descent(
        residual.numpy(),
        correlation.numpy(),
        weight.numpy(),
        gram.contiguous().numpy(),
        inverse_diagonal(gram).numpy(),
        scale.numpy(),
        zero.numpy(),
        group.numpy(),
        np.float32(qmax),
        unused if codes is None else codes.numpy(),
        codes is not None,
    )


def gptq_cpu_(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, qmax: int, codes: Tensor, errors: Tensor
) -> None:
    """`blocks.gptq_torch_` for float32 tensors on the CPU."""
    _share_threads()
    _gptq(
        weight.numpy(),
        upper.contiguous().numpy(),
        scale.numpy(),
        zero.numpy(),
        group.numpy(),
        np.float32(qmax),
        codes.numpy(),
        errors.numpy(),
    )
