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
TOGETHER = 4  # columns whose steps reach the later ones in one pass over these, as `_add_steps` writes it out
SPARSE_BELOW = 0.1  # share of changed entries below which they are propagated one by one
NO_CODES, NO_FLAGS, NO_LIMITS = np.empty((0, 0), np.uint8), np.empty((0, 0), np.bool_), np.empty(0, np.float32)

# Blocks are slices of larger matrices: any row stride, one compiled version. Only the B x B matrix is contiguous.
_CD = "i8(f4[:,:],f4[:,:],f4[:,:],f4[:,:,::1],f4[:,::1],f4[:,:],f4[:,:],i8[::1],f4,f4[::1],f4[::1],u1[:,:],b1[:,:],f4[:,::1])"
_GPTQ = "void(f4[:,:],f4[:,:],f4[:,:,::1],f4[:,:],f4[:,:],i8[::1],f4,f4[::1],f4[::1],u1[:,:],f4[:,:],f4[::1])"
_PROPAGATE = "void(f4[:,::1],f4[:,::1],f4[:,:,::1])"
_INLINE: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract"}}
_OPTIONS: dict[str, Any] = {**_INLINE, "parallel": True}


@njit(inline="always", **_INLINE)
def _tile(matrix, first, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """n rows of a matrix from the first, columns first, with zeros up to a whole tile."""
    tile = np.zeros((matrix.shape[1], TILE), matrix.dtype)
    for o in range(n):
        for j in range(matrix.shape[1]):
            tile[j, o] = matrix[first + o, j]
    return tile


@njit(inline="always", **_INLINE)
def _put(matrix, tile, first, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The rows of a tile back into their matrix."""
    for o in range(n):
        for j in range(matrix.shape[1]):
            matrix[first + o, j] = tile[j, o]


@njit(inline="always", **_INLINE)
def _round(u, scale, zero, qmax, levels, middles, codes, values, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Codes and values of n numbers u: of whole steps from the zero, or the level next to u / scale."""
    if levels.size:
        for o in range(n):
            ratio, low, high = u[o] / scale[o], 0, middles.size
            while low < high:
                middle = (low + high) >> 1
                if middles[middle] < ratio:
                    low = middle + 1
                else:
                    high = middle
            codes[o], values[o] = np.uint8(low), levels[low] * scale[o]
        return
    for o in range(n):
        whole = np.rint(zero[o])
        code = np.rint(u[o] / scale[o] + (zero[o] - whole)) + whole
        code = min(max(code, np.float32(0)), qmax)
        codes[o], values[o] = np.uint8(code), (code - zero[o]) * scale[o]


@njit(inline="always", **_INLINE)
def _add_steps(to, steps, factors, first, last, n_columns):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """to[k] += factors[j, k] steps[j] for at most TOGETHER columns j in [first, last), in this order, and every later k."""
    if last - first < TOGETHER:
        for j in range(first, last):
            for k in range(last, n_columns):
                factor = factors[j, k]
                for o in range(TILE):
                    to[k, o] += factor * steps[j, o]
        return
    a, b, c, d = steps[first], steps[first + 1], steps[first + 2], steps[first + 3]
    for k in range(last, n_columns):
        fa, fb, fc, fd = factors[first, k], factors[first + 1, k], factors[first + 2, k], factors[first + 3, k]
        for o in range(TILE):
            to[k, o] = to[k, o] + fa * a[o] + fb * b[o] + fc * c[o] + fd * d[o]


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
        c, w, r = _tile(correlation, first, n), _tile(weight, first, n), _tile(residual, first, n)
        step, q = np.zeros((n_columns, TILE), np.float32), np.zeros((n_columns, TILE), np.uint8)
        u, value, s, z = np.zeros((4, TILE), np.float32)
        g = -1
        for start in range(0, n_columns, TOGETHER):
            end = min(start + TOGETHER, n_columns)
            moved = 0
            for j in range(start, end):
                inv = inverse[layer, j]
                for o in range(n):
                    u[o] = w[j, o] - r[j, o] + c[j, o] * inv
                if codes.size:
                    if group[j] != g:
                        g = group[j]
                        for o in range(n):
                            s[o], z[o] = scale[first + o, g], zero[first + o, g]
                    _round(u, s, z, qmax, levels, middles, q[j], value, n)
                    for o in range(n):
                        u[o] = u[o] if free.size and free[first + o, j] else value[o]
                for o in range(n):
                    new = w[j, o] - u[o]
                    step[j, o] = new - r[j, o]
                    moved += step[j, o] != 0
                    r[j, o] = new
                if moved:
                    _add_steps(c, step, gram[layer], j, j + 1, end)
            changed[tile] += moved
            if moved:
                _add_steps(c, step, gram[layer], start, end, n_columns)
        _put(residual, r, first, n)
        _put(change, step, first, n)
        if codes.size:
            _put(codes, q, first, n)
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
        w, step = _tile(weight, first, n), _tile(target, first, n)
        q = np.zeros((n_columns, TILE), np.uint8)
        value, s, z = np.zeros((3, TILE), np.float32)
        g = -1
        for start in range(0, n_columns, TOGETHER):
            end = min(start + TOGETHER, n_columns)
            for j in range(start, end):
                if group[j] != g:
                    g = group[j]
                    for o in range(n):
                        s[o], z[o] = scale[first + o, g], zero[first + o, g]
                _round(w[j], s, z, qmax, levels, middles, q[j], value, n)
                if outlier_above.size:
                    for o in range(n):
                        off = w[j, o] - value[o]
                        value[o] = w[j, o] if off * off > outlier_above[j] else value[o]
                for o in range(n):
                    step[j, o] -= value[o]
                _add_steps(w, step, feedback[layer], j, j + 1, end)
            _add_steps(w, step, feedback[layer], start, end, n_columns)
        _put(weight, w, first, n)
        _put(errors, step, first, n)
        _put(codes, q, first, n)


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
