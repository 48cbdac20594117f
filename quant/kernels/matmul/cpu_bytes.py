"""Packed products on a CPU with AVX2, for inputs rounded to bytes: a scale for 32 of them, as llama.cpp multiplies.

    y[o] = Σ_g scale[g, o] (Σ_b s[b] Σ_i code[o, i] q[i] - zero[g, o] Σ_b s[b] Σ_i q[i]),    x[i] ≈ s[b] q[i], i in block b

Codes lie as in `cpu_fields`. Masked, a word is four codes of a row, a byte each, which one instruction multiplies by four
inputs, eight rows at a time; sums of a block fit in 16 bits and become floats once in 32 columns. A code of 8 bits is taken
as two of 4, that of three fields as three, each with the inputs in its own order. One token takes a whole tile at a time, more take
half of one and share the codes.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from quant.kernels.matmul.cpu import _OPTIONS, AHEAD, Emitter, vector_level
from quant.kernels.matmul.cpu_fields import MULTIPLIED, TOKENS, WIDTHS, FieldTiles, _add_group, fields_of
from quant.kernels.matmul.weight import TILE, WORD, PackedWeight
from quant.kernels.threads import share_threads

BLOCK = 32  # inputs of one scale
TOP = 127  # of a rounded input
NIBBLE = 4  # widest part of a code whose products with 32 inputs fit in 16 bits
LINE = 64  # bytes of a cache line
LANES = 8  # rows of a register: AVX2, also where there is more


def parts_of(bits: int) -> list[tuple[int, int, int]]:
    """Of every part of a code: the width of its field, the field's lowest bit, and the part's first bit in the field."""
    return [(width, low, first) for width, low in fields_of(bits) for first in range(0, width, NIBBLE)]


def rounded_up_to(bits: int) -> int:
    """Tokens up to which inputs are rounded: above, floats are faster (benchmarks/results/packed.md)."""
    if len(parts_of(bits)) == 1:
        return sys.maxsize
    return 2 if bits == WIDTHS[0] else MULTIPLIED[len(fields_of(bits)) - 1]


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
    typing: Any, stored: Any, tile: Any, half: Any, x: Any, scales: Any, token: Any, block: Any, blocks: Any, out: Any,
    bits: Any, tokens: Any,
) -> Any:  # fmt: skip
    """out[token, rows] = Σ s[block] Σ code · q over ``blocks`` blocks of 32 columns from ``block`` on, for the ``len(tokens)``
    tokens from ``token`` on; all 32 rows of a tile for one token, those of a ``half`` for more.

    x: int32 [n, blocks, parts, 8], four inputs a word in the order of `orders_of`. scales: float32 [n, blocks].
    """
    n_bits, n_tokens = bits.count, tokens.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args, LANES)
        products, parts = _ByteProducts(e, n_bits), e.parts if n_tokens == 1 else e.parts // 2
        source, target = e.row(0, args[1], e.ints), e.pointer(8, e.floats)
        first_part = builder.mul(args[2], e.size(parts))
        numbers = [builder.add(args[5], e.size(t)) for t in range(n_tokens)]
        inputs, factors = ([e.row(i, n, kind) for n in numbers] for i, kind in ((3, ir.IntType(32)), (4, e.float)))
        totals = [e.accumulators(e.floats, parts, 0.0) for _ in range(n_tokens)]
        with cgutils.for_range(builder, args[7]) as loop:
            here = builder.add(args[6], loop.index)
            words = builder.add(builder.mul(here, e.size(n_bits * e.parts)), first_part)
            given = builder.mul(here, e.size(len(parts_of(n_bits)) * 8))
            scale = [e.broadcast(e.load(own, here), e.floats) for own in factors]
            if n_tokens == 1:
                for line in range(n_bits * TILE * 4 // LINE):  # hardware does not run ahead far enough
                    e.prefetch(e.at(source, builder.add(words, e.size((AHEAD + line * LINE) // (LANES * 4)))))
            for p in range(parts):
                sums = products.of_block(source, builder.add(words, e.size(p)), inputs, given)
                for t in range(n_tokens):
                    own = builder.sitofp(sums[t], e.floats)
                    builder.store(e.multiply_add(own, scale[t], builder.load(totals[t][p])), totals[t][p])
        for t in range(n_tokens):
            for p in range(parts):
                e.store(builder.load(totals[t][p]), target, builder.add(first_part, e.size(t * e.parts + p)))
        return context.get_dummy_value()

    return types.void(stored, tile, half, x, scales, token, block, blocks, out, bits, tokens), emit


class _ByteProducts:
    """Sums of products of a block's codes with inputs, of eight rows."""

    def __init__(self, e: Emitter, bits: int) -> None:
        self.e, self.bits = e, bits
        self.bytes, self.shorts = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)

        def named(name: str, given: ir.Type, made: ir.Type) -> Any:
            return cgutils.get_or_insert_function(e.builder.module, ir.FunctionType(made, [given, given]), name)

        self.pairs = named("llvm.x86.avx2.pmadd.ub.sw", self.bytes, self.shorts)
        self.widened = named("llvm.x86.avx2.pmadd.wd", self.shorts, e.ints)

    def of_block(self, source: Any, words: Any, inputs: list[Any], given: Any) -> list[Any]:
        """Int32 of eight rows for every token. words, given: where the block's words and inputs begin."""
        e, builder, whole = self.e, self.e.builder, [None] * len(inputs)
        ones = ir.Constant(self.shorts, [1] * self.shorts.count)
        for n, (width, low, first) in enumerate(parts_of(self.bits)):
            totals, at = [None] * len(inputs), 8 * n
            mask = e.every(((1 << min(width, NIBBLE)) - 1) * 0x01010101)
            for j in range(width):
                word = e.load(source, builder.add(words, e.size((low + j) * e.parts)))
                for k in range(8 // width):
                    shift = first + k * width
                    codes = builder.and_(builder.lshr(word, e.every(shift)) if shift else word, mask)
                    for t, own in enumerate(inputs):
                        four = e.broadcast(e.load(own, builder.add(given, e.size(at))), e.ints)
                        product = builder.call(self.pairs, [builder.bitcast(v, self.bytes) for v in (codes, four)])
                        totals[t] = product if totals[t] is None else builder.add(totals[t], product)
                    at += 1
            for t, total in enumerate(totals):
                sums = builder.call(self.widened, [total, ones])
                sums = builder.shl(sums, e.every(low + first)) if low + first else sums
                whole[t] = sums if whole[t] is None else builder.add(whole[t], sums)
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
def _multiply(stored, given, orders, n_groups, scale, zeros, width, one_zero, blocks, y, bits, tokens):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    """y, zero before, gets what the given inputs, rounded, times the weight are, ``len(tokens)`` of them at a time. blocks: of a
    group."""
    rounded = np.empty((given.shape[0], stored.shape[1], orders.shape[0], BLOCK), np.int8)
    scales, sums = (
        np.empty((given.shape[0], stored.shape[1]), np.float32),
        np.empty((given.shape[0], n_groups), np.float32),
    )
    round_inputs(given, orders, blocks * BLOCK, rounded, scales, sums)
    x = rounded.view(np.int32)
    per = len(tokens)
    for tile in prange(stored.shape[0]):
        out = np.empty((per, TILE), np.float32)
        for first in range(0, x.shape[0], per):
            for g in range(sums.shape[1]):
                for half in range(1 if per == 1 else 2):
                    _byte_sums(stored, tile, half, x, scales, first, g * blocks, blocks, out, bits, tokens)  # type: ignore[call-arg]
                _add_group(scale, zeros, width, one_zero, g, tile, sums, first, out, y, tokens)  # type: ignore[call-arg]


class ByteTiles(FieldTiles):
    """`FieldTiles` that rounds inputs to bytes, where groups are whole blocks of 32 columns."""

    @staticmethod
    def runs_here() -> bool:
        """Whether this CPU has the instructions."""
        return vector_level() != "none"

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`."""
        if x.shape[0] > rounded_up_to(weight.bits) or weight.group % BLOCK or weight.grid.codes is not None:
            return super().matmul(x, weight)
        share_threads()
        n, (words, grid, zeros, group, bits, _) = x.shape[0], weight.once(self.arguments)
        tokens = (0,) * (1 if n < TOKENS - 1 else TOKENS)
        x = F.pad(x.float(), (0, 0, 0, -n % len(tokens))).contiguous()
        y, orders = np.zeros((len(x), words.shape[0] * TILE), np.float32), orders_of(weight.bits)
        _multiply(words, x.numpy(), orders, weight.n_groups, grid[0], *zeros, group // BLOCK, y, bits, tokens)
        return torch.from_numpy(y if len(y) == n else y[:n])
