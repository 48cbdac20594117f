"""Products of packed weights with one token as functions of addresses, for programs of operations (`quant.kernels.steps`): the
very loops of the layouts, without what calling them from Python takes."""

# mypy: disable-error-code="call-arg, arg-type"
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import overload
from torch import Tensor

from quant.kernels.matmul.cpu_bytes import BLOCK, ByteTiles, orders_of
from quant.kernels.matmul.cpu_bytes import _multiply as multiply_rounded
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.cpu_fields import _group_sums as group_sums
from quant.kernels.matmul.cpu_fields import _multiply as multiply
from quant.kernels.matmul.weight import TILE, WORD, PackedWeight
from quant.kernels.steps.loops import at

ARGUMENTS = types.void(types.CPointer(types.int64))
# Of a product's arguments: addresses of words, x, y, scales, zero points, orders, and of the zero point of all; tiles, blocks,
# groups, columns of a group, bytes of zero points, their width.
WORDS, INPUT, OUTPUT, SCALE, ZEROS, ORDERS, ONE, TILES, BLOCKS, GROUPS, GROUP, ZERO_ROWS, ZERO_WIDTH = range(13)


def one_token(weight: PackedWeight, x: Tensor, y: Tensor) -> tuple[int, list[int], list[Any]] | None:
    """The address of a function that makes y float32 [rows, filled up] of x float32 [in], both contiguous, its arguments, and
    what they are addresses of; None for a weight that is more than codes, scales and zero points, or lies otherwise."""
    layout, grid = weight.layout, weight.grid
    more = (weight.order, weight.outliers, grid.codes, grid.minimum)
    if not isinstance(layout, FieldTiles) or any(part is not None for part in more):
        return None
    if weight.n_groups * weight.group != weight.n_in or weight.n_in % WORD:  # columns are filled up
        return None
    words, (scale, *_), (zeros, width, one), group, bits, steps = weight.once(layout.arguments)
    half, fine, has_zeros = scale.dtype == np.uint16, not isinstance(layout, ByteTiles) or group % BLOCK, len(zeros) > 0
    if not words.flags.c_contiguous or not scale.flags.c_contiguous or (has_zeros and not zeros.flags.c_contiguous):
        return None
    kept = [words, scale, zeros if has_zeros else None, np.array([one], np.float32)]
    function = of_fields(len(bits), len(steps), half, has_zeros) if fine else of_bytes(len(bits), half, has_zeros)
    orders = None if fine else orders_of(len(bits))
    arguments = [0] * 13
    arguments[WORDS], arguments[INPUT], arguments[OUTPUT] = words.ctypes.data, x.data_ptr(), y.data_ptr()
    arguments[SCALE], arguments[ONE] = scale.ctypes.data, kept[3].ctypes.data
    arguments[TILES], arguments[BLOCKS], arguments[GROUPS] = words.shape[0], words.shape[1], weight.n_groups
    arguments[GROUP], arguments[ZERO_WIDTH] = group, width
    if has_zeros:
        arguments[ZEROS], arguments[ZERO_ROWS] = zeros.ctypes.data, zeros.shape[0]
    if orders is not None:
        arguments[ORDERS] = orders.ctypes.data
    return function.address, arguments, [*kept, orders, x, y]


@njit(cache=True)
def _ends(a, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Words, x, and y, which is made zero."""
    y = carray(at(a[OUTPUT]), (1, a[TILES] * TILE), np.float32)
    y[:] = 0
    words = carray(at(a[WORDS]), (a[TILES], a[BLOCKS], len(bits), TILE), np.uint32)
    return words, carray(at(a[INPUT]), (1, a[BLOCKS] * WORD), np.float32), y


def _grid(a, half, zeros):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Scales, and zero points, or () where all have the same."""
    raise NotImplementedError  # compiled code alone calls it


@overload(_grid)
def _compiled_grid(a, half, zeros):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    kind = np.uint16 if half.count else np.float32
    if not zeros.count:
        return lambda a, half, zeros: (carray(at(a[SCALE]), (a[GROUPS], a[TILES] * TILE), kind), ())
    return lambda a, half, zeros: (
        carray(at(a[SCALE]), (a[GROUPS], a[TILES] * TILE), kind),
        carray(at(a[ZEROS]), (a[ZERO_ROWS], a[TILES] * TILE), np.uint8),
    )


@cache
def of_fields(n_bits: int, n_steps: int, is_half: bool, has_zeros: bool) -> Any:
    """As `FieldTiles.matmul` for one token."""
    bits, steps, tokens, half, some = (0,) * n_bits, (0,) * n_steps, (0,), (0,) * is_half, (0,) * has_zeros

    def product(a):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        words, x, y = _ends(a, bits)
        scale, zeros = _grid(a, half, some)
        one, sums = carray(at(a[ONE]), 1, np.float32)[0], np.empty((1, a[GROUPS]), np.float32)
        group_sums(x, a[GROUP], sums)
        multiply(words, x, sums, scale, zeros, a[ZERO_WIDTH], one, a[GROUP], y, bits, steps, tokens)

    return cfunc(ARGUMENTS, cache=True, error_model="numpy")(product)


@cache
def of_bytes(n_bits: int, is_half: bool, has_zeros: bool) -> Any:
    """As `ByteTiles.matmul`."""
    bits, tokens, half, some = (0,) * n_bits, (0,), (0,) * is_half, (0,) * has_zeros
    parts = len(orders_of(n_bits))

    def product(a):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        words, x, y = _ends(a, bits)
        scale, zeros = _grid(a, half, some)
        one, orders = carray(at(a[ONE]), 1, np.float32)[0], carray(at(a[ORDERS]), (parts, BLOCK), np.int64)
        blocks = a[GROUP] // BLOCK
        multiply_rounded(words, x, orders, a[GROUPS], scale, zeros, a[ZERO_WIDTH], one, blocks, y, bits, tokens)

    return cfunc(ARGUMENTS, cache=True, error_model="numpy")(product)
