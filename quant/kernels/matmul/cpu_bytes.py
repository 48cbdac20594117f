"""Packed products on a CPU with AVX2, for inputs rounded to bytes: a scale for 32 of them, as llama.cpp multiplies.

    y[o] = Σ_g scale[g, o] (Σ_b s[b] Σ_i code[o, i] q[i] - zero[g, o] Σ_b s[b] Σ_i q[i]),    x[i] ≈ s[b] q[i], i in block b

Codes lie as in `cpu_fields`. Masked, a word is four codes of a row, a byte each, which one instruction multiplies by four
inputs, eight rows at a time; sums of a block fit in 16 bits and become floats once in 32 columns. A code of 8 bits is taken
as two of 4, that of three fields as three, each with the inputs in its own order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from quant.kernels.matmul.cpu import _OPTIONS, AHEAD, Emitter, vector_level
from quant.kernels.matmul.cpu_fields import FieldTiles, _add_group, fields_of
from quant.kernels.matmul.weight import TILE, WORD, PackedWeight
from quant.kernels.threads import share_threads

BLOCK = 32  # inputs of one scale
TOP = 127  # of a rounded input
ROUNDED = 8  # tokens up to which inputs are rounded; above, codes are worth making floats of
NIBBLE = 4  # widest part of a code whose products with 32 inputs fit in 16 bits
LINE = 64  # bytes of a cache line
LANES = 8  # rows of a register: AVX2, also where there is more


def parts_of(bits: int) -> list[tuple[int, int, int]]:
    """Of every part of a code: the width of its field, the field's lowest bit, and the part's first bit in the field."""
    return [(width, low, first) for width, low in fields_of(bits) for first in range(0, width, NIBBLE)]


@cache
def orders_of(bits: int) -> np.ndarray:
    """int64 [parts, 32]: which column of a block stands at every byte of the inputs, for every part of a code.

    A word of a field holds 32 / width columns; shifted by k fields and masked, every (8 / width)th of them.
    """
    orders = []
    for width, _, _ in parts_of(bits):
        per, step = WORD // width, 8 // width
        orders.append([word * per + byte * step + k for word in range(width) for k in range(step) for byte in range(4)])
    return np.array(orders)


@intrinsic
def _byte_sums(
    typing: Any, stored: Any, tile: Any, x: Any, scales: Any, token: Any, block: Any, blocks: Any, out: Any, bits: Any
) -> Any:
    """out[32 rows] = Σ s[block] Σ code · q over ``blocks`` blocks of 32 columns from ``block`` on, for token ``token``.

    x: int32 [n, blocks, parts, 8], four inputs a word in the order of `orders_of`. scales: float32 [n, blocks].
    """
    n_bits = bits.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args, LANES)
        products = _ByteProducts(e, n_bits)
        source, inputs = e.row(0, args[1], e.ints), e.row(2, args[4], ir.IntType(32))
        factors, target = e.row(3, args[4], e.float), e.pointer(7, e.floats)
        totals = e.accumulators(e.floats, e.parts, 0.0)
        with cgutils.for_range(builder, args[6]) as loop:
            here = builder.add(args[5], loop.index)
            words = builder.mul(here, e.size(n_bits * e.parts))
            given = builder.mul(here, e.size(len(parts_of(n_bits)) * 8))
            factor = e.broadcast(e.load(factors, here), e.floats)
            for line in range(n_bits * TILE * 4 // LINE):  # hardware does not run ahead far enough
                e.prefetch(e.at(source, builder.add(words, e.size((AHEAD + line * LINE) // (LANES * 4)))))
            for p in range(e.parts):
                own = builder.sitofp(products.of_block(source, builder.add(words, e.size(p)), inputs, given), e.floats)
                builder.store(e.multiply_add(own, factor, builder.load(totals[p])), totals[p])
        for p in range(e.parts):
            e.store(builder.load(totals[p]), target, p)
        return context.get_dummy_value()

    return types.void(stored, tile, x, scales, token, block, blocks, out, bits), emit


class _ByteProducts:
    """Sums of products of a block's codes with inputs, of eight rows."""

    def __init__(self, e: Emitter, bits: int) -> None:
        self.e, self.bits = e, bits
        self.bytes, self.shorts = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)

        def named(name: str, given: ir.Type, made: ir.Type) -> Any:
            return cgutils.get_or_insert_function(e.builder.module, ir.FunctionType(made, [given, given]), name)

        self.pairs = named("llvm.x86.avx2.pmadd.ub.sw", self.bytes, self.shorts)
        self.widened = named("llvm.x86.avx2.pmadd.wd", self.shorts, e.ints)

    def of_block(self, source: Any, words: Any, inputs: Any, given: Any) -> Any:
        """Int32 of eight rows. words, given: where the block's words and inputs begin."""
        e, builder, whole = self.e, self.e.builder, None
        ones = ir.Constant(self.shorts, [1] * self.shorts.count)
        for n, (width, low, first) in enumerate(parts_of(self.bits)):
            total, at = None, 8 * n
            mask = e.every(((1 << min(width, NIBBLE)) - 1) * 0x01010101)
            for j in range(width):
                word = e.load(source, builder.add(words, e.size((low + j) * e.parts)))
                for k in range(8 // width):
                    shift = first + k * width
                    codes = builder.and_(builder.lshr(word, e.every(shift)) if shift else word, mask)
                    four = e.broadcast(e.load(inputs, builder.add(given, e.size(at))), e.ints)
                    operands = [builder.bitcast(vector, self.bytes) for vector in (codes, four)]
                    product = builder.call(self.pairs, operands)
                    total = product if total is None else builder.add(total, product)
                    at += 1
            sums = builder.call(self.widened, [total, ones])
            sums = builder.shl(sums, e.every(low + first)) if low + first else sums
            whole = sums if whole is None else builder.add(whole, sums)
        return whole


@njit(**_OPTIONS)
def round_inputs(x, orders, group, rounded, scales, sums):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Inputs [n, columns] as bytes [n, blocks, parts, 32] in every part's order, with scales; sums of each group of what they
    stand for."""
    own = np.empty(BLOCK, np.int8)
    sums[:] = 0
    for n in range(scales.shape[0]):
        for block in range(scales.shape[1]):
            largest = np.float32(0)
            for i in range(BLOCK):
                largest = max(largest, abs(x[n, block * BLOCK + i]))
            scale = largest / np.float32(TOP)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            total = 0
            for i in range(BLOCK):
                own[i] = np.int8(np.rint(x[n, block * BLOCK + i] * inverse))
                total += own[i]
            for part in range(orders.shape[0]):
                for i in range(BLOCK):
                    rounded[n, block, part, i] = own[orders[part, i]]
            scales[n, block] = scale
            sums[n, block * BLOCK // group] += scale * np.float32(total)


@njit(parallel=True, **_OPTIONS)
def _multiply(stored, given, orders, n_groups, scale, zeros, width, one_zero, blocks, y, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    """y, zero before, gets what the given inputs, rounded, times the weight are. blocks: of a group."""
    rounded = np.empty((given.shape[0], stored.shape[1], orders.shape[0], BLOCK), np.int8)
    scales, sums = (
        np.empty((given.shape[0], stored.shape[1]), np.float32),
        np.empty((given.shape[0], n_groups), np.float32),
    )
    round_inputs(given, orders, blocks * BLOCK, rounded, scales, sums)
    x = rounded.view(np.int32)
    for tile in prange(stored.shape[0]):
        out = np.empty((1, TILE), np.float32)
        for n in range(x.shape[0]):
            for g in range(sums.shape[1]):
                _byte_sums(stored, tile, x, scales, n, g * blocks, blocks, out, bits)  # type: ignore[call-arg]
                _add_group(scale, zeros, width, one_zero, g, tile, sums, n, out, y, (0,))


class ByteTiles(FieldTiles):
    """`FieldTiles` that rounds the inputs of a few tokens to bytes, where groups are whole blocks of 32 columns."""

    @staticmethod
    def runs_here() -> bool:
        """Whether this CPU has the instructions."""
        return vector_level() != "none"

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`."""
        if x.shape[0] > ROUNDED or weight.group % BLOCK or weight.grid.codes is not None:
            return super().matmul(x, weight)
        share_threads()
        n, (words, grid, zeros, group, bits, _) = x.shape[0], weight.once(self.arguments)
        given = (x if x.dtype == torch.float32 else x.float()).contiguous().numpy()
        y = np.zeros((n, words.shape[0] * TILE), np.float32)
        _multiply(words, given, orders_of(weight.bits), weight.n_groups, grid[0], *zeros, group // BLOCK, y, bits)
        return torch.from_numpy(y)
