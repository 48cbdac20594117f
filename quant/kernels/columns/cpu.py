"""The block loops compiled with numba: parallel over tiles of rows, vectorized along a tile.

A tile of the block is brought into a [B, TILE] buffer, columns first, which stays in the cache of its core together
with the B x B matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from quant.core.levels import Table, level_tensors
from quant.core.stacks import add_times_
from quant.kernels.columns.reference import ColumnBlock
from quant.kernels.threads import share_threads

TILE = 64
SPARSE_BELOW = 0.1  # share of changed entries below which they are propagated one by one
NO_CODES, NO_FLAGS, NO_LIMITS = np.empty((0, 0), np.uint8), np.empty((0, 0), np.bool_), np.empty(0, np.float32)

# Blocks are slices of larger matrices: any row stride, one compiled version. Only the B x B matrix is contiguous.
_CD = "i8(f4[:,:],f4[:,:],f4[:,:],f4[:,:,::1],f4[:,::1],f4[:,:],f4[:,:],i8[::1],f4,f4[::1],f4[::1],u1[:,:],b1[:,:],f4[:,::1])"
_GPTQ = "void(f4[:,:],f4[:,:],f4[:,:,::1],f4[:,:],f4[:,:],i8[::1],f4,f4[::1],f4[::1],u1[:,:],f4[:,:],f4[::1])"
_PROPAGATE = "void(f4[:,::1],f4[:,::1],f4[:,:,::1])"
_OPTIONS: dict[str, Any] = {"parallel": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(inline="always", **{k: v for k, v in _OPTIONS.items() if k != "parallel"})
def _nearest(u, scale, zero, qmax, levels, middles):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Code and value of u: of whole steps from the zero, or the level next to u / scale."""
    if levels.size:
        ratio, low, high = u / scale, 0, middles.size
        while low < high:
            middle = (low + high) >> 1
            if middles[middle] < ratio:
                low = middle + 1
            else:
                high = middle
        return np.float32(low), levels[low] * scale
    whole = np.rint(zero)
    code = np.rint(u / scale + (zero - whole)) + whole
    code = min(max(code, np.float32(0)), qmax)
    return code, (code - zero) * scale


@njit(_CD, **_OPTIONS)
def _coordinate_descent(  # type: ignore[no-untyped-def]
    residual, correlation, weight, gram, inverse, scale, zero, group, qmax, levels, middles, codes, free, change,  # noqa: ANN001
):  # noqa: ANN202  # fmt: skip
    n_rows, n_columns = weight.shape[0] // len(gram), weight.shape[1]  # rows of a layer
    tiles = (n_rows + TILE - 1) // TILE
    changed = np.zeros(len(gram) * tiles, np.int64)
    for tile in prange(len(gram) * tiles):
        layer = tile // tiles
        first = layer * n_rows + (tile - layer * tiles) * TILE
        n = min(TILE, (layer + 1) * n_rows - first)
        c, step = np.empty((n_columns, TILE), np.float32), np.zeros(TILE, np.float32)
        for o in range(n):
            for j in range(n_columns):
                c[j, o] = correlation[first + o, j]
        for j in range(n_columns):
            g, inv, moved = group[j], inverse[layer, j], 0
            for o in range(n):
                row = first + o
                u = weight[row, j] - residual[row, j] + c[j, o] * inv
                if codes.size:
                    code, value = _nearest(u, scale[row, g], zero[row, g], qmax, levels, middles)
                    codes[row, j] = np.uint8(code)
                    if not (free.size and free[row, j]):
                        u = value
                new = weight[row, j] - u
                step[o] = new - residual[row, j]
                moved += step[o] != 0
                residual[row, j] = new
                change[row, j] = step[o]
            changed[tile] += moved
            if moved:
                for k in range(j + 1, n_columns):
                    factor = gram[layer, j, k]
                    for o in range(TILE):
                        c[k, o] += factor * step[o]
    return changed.sum()


@njit(_GPTQ, **_OPTIONS)
def _gptq(  # type: ignore[no-untyped-def]
    weight, target, feedback, scale, zero, group, qmax, levels, middles, codes, errors, outlier_above,  # noqa: ANN001
):  # noqa: ANN202  # fmt: skip
    n_rows, n_columns = weight.shape[0] // len(feedback), weight.shape[1]  # rows of a layer
    tiles = (n_rows + TILE - 1) // TILE
    for tile in prange(len(feedback) * tiles):
        layer = tile // tiles
        first = layer * n_rows + (tile - layer * tiles) * TILE
        n = min(TILE, (layer + 1) * n_rows - first)
        w, step = np.zeros((n_columns, TILE), np.float32), np.zeros(TILE, np.float32)
        for o in range(n):
            for j in range(n_columns):
                w[j, o] = weight[first + o, j]
        for j in range(n_columns):
            g = group[j]
            for o in range(n):
                row, kept = first + o, w[j, o]
                code, value = _nearest(kept, scale[row, g], zero[row, g], qmax, levels, middles)
                off = kept - value
                if not (outlier_above.size and off * off > outlier_above[j]):
                    kept = value
                codes[row, j] = np.uint8(code)
                weight[row, j] = w[j, o]
                step[o] = target[row, j] - kept
                errors[row, j] = step[o]
            for k in range(j + 1, n_columns):
                factor = feedback[layer, j, k]
                for o in range(TILE):
                    w[k, o] += factor * step[o]


@njit(_PROPAGATE, **_OPTIONS)
def _propagate(correlation, change, gram):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    n_rows, n_in = correlation.shape
    for row in prange(n_rows):
        layer = row * len(gram) // n_rows
        for j in range(change.shape[1]):
            step = change[row, j]
            if step != 0:
                for k in range(n_in):
                    correlation[row, k] += step * gram[layer, j, k]


class NumbaKernels:
    """float32 tensors on the CPU."""

    name, reach = "numba", 0

    def coordinate_descent_(self, block: ColumnBlock) -> Tensor:
        """In tiles of rows; see `Kernels`."""
        share_threads()
        change = torch.empty(block.target.shape)
        _coordinate_descent(
            block.residual.numpy(), block.incoming.numpy(), block.target.numpy(),
            _stack(block.matrix), _stack(block.inverses(), 2), *_grid(block),
            block.codes.numpy() if block.rounding else NO_CODES,
            NO_FLAGS if block.free is None else block.free.numpy(),
            change.numpy(),
        )  # fmt: skip
        return change

    def gptq_(self, block: ColumnBlock) -> None:
        """In tiles of rows; see `Kernels`."""
        share_threads()
        _gptq(
            block.incoming.numpy(), block.target.numpy(), _stack(block.matrix), *_grid(block),
            block.codes.numpy(), block.residual.numpy(),
            NO_LIMITS if block.outlier_above is None else block.outlier_above.contiguous().numpy(),
        )  # fmt: skip

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """Few changes are added one by one; many in a matrix product."""
        if int(torch.count_nonzero(change)) < SPARSE_BELOW * change.numel():
            share_threads()
            _propagate(correlation.numpy(), change.contiguous().numpy(), _stack(gram))
        else:
            add_times_(correlation, change, gram)


def _stack(matrix: Tensor, dimensions: int = 3) -> np.ndarray:
    """A matrix of every layer, of one layer too."""
    stacked: np.ndarray = matrix.contiguous().view(*[1] * (dimensions - matrix.dim()), *matrix.shape).numpy()
    return stacked


def _grid(block: ColumnBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.float32, np.ndarray, np.ndarray]:
    levels, middles = (NO_LIMITS, NO_LIMITS) if block.numbers.table is None else _levels(block.numbers.table)
    qmax = np.float32(block.numbers.qmax)
    return block.scale.numpy(), block.zero.numpy(), block.group.numpy(), qmax, levels, middles


def _levels(table: Table) -> tuple[np.ndarray, np.ndarray]:
    levels, middles = level_tensors(table, torch.device("cpu"), torch.float32)
    return levels.numpy(), middles.numpy()
