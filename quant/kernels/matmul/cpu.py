"""Packed products on a CPU with AVX-512: bit planes in tiles of 32 rows, one row a lane of the vector registers.

Four columns of a plane are a number from 0 to 15. Inputs in float: the 16 sums of subsets of four inputs fill one or two
registers, and a permutation of them by the numbers of 16 (or 8) rows answers 64 products at once (the table lookup of
T-MAC, Wei et al. 2024, in full precision). Inputs in int8: the same permutation spreads the four bits to four bytes, which
a dot product of bytes multiplies; a row of ones among the inputs gives the sums of codes that offsets need.

The permutations are named by LLVM intrinsics that numba passes on: AVX-512, AVX2, or memory reads anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic
from torch import Tensor

from quant.kernels.matmul.choice import is_multiplied
from quant.kernels.matmul.weight import QUAD, TILE, WORD, PackedGrid, PackedWeight, SmallInts, floats_of
from quant.kernels.threads import share_threads

LOOKED_UP = 128  # tokens times bits up to which float inputs are looked up where nothing is measured (`choice`)
EXPANDED = 1 << 22  # weights expanded at a time: 16 MB of float32
AHEAD = 2048  # bytes of planes that are asked for before they are read
TOKENS = (2, 9)  # rows of int8 inputs, one of them ones, that meet a spread weight: compiled variants
STEPS = (8, 4, 1)  # quads taken at a time: those of a word, or fewer where groups end inside words: compiled variants
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract"}}
_F32, _I32, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)


@cache
def vector_level() -> str:
    """What the permutations are made of: ``avx512``, ``avx2`` or ``none``; numba's own settings narrow it."""
    named = config.CPU_FEATURES  # type: ignore[attr-defined]  # NUMBA_CPU_FEATURES, where set: "+avx2,-avx512f,..."
    has = set(named.split(",")) if named else {f"+{k}" for k, v in llvm.get_host_cpu_features().items() if v}
    if {"+avx512f", "+avx512bw"} <= has:
        return "avx512"
    return "avx2" if "+avx2" in has else "none"


@cache
def has_byte_products() -> bool:
    """Whether the CPU multiplies bytes four at a time (AVX512-VNNI)."""
    named = config.CPU_FEATURES  # type: ignore[attr-defined]
    has_vnni = "+avx512vnni" in named if named else llvm.get_host_cpu_features().get("avx512vnni", False)
    return bool(has_vnni) and vector_level() == "avx512"


class Emitter:
    """Instructions of one intrinsic: vectors of ``lanes`` rows, loads and stores without alignment."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, lanes: int | None = None) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args
        self.level = vector_level()
        self.lanes = lanes or (16 if self.level == "avx512" else 8)
        self.parts = TILE // self.lanes
        self.float = _F32
        self.ints, self.floats = ir.VectorType(_I32, self.lanes), ir.VectorType(_F32, self.lanes)

    def array(self, i: int) -> Any:
        """The struct of array argument i."""
        return self.context.make_array(self.signature.args[i])(self.context, self.builder, self.args[i])

    def pointer(self, i: int, kind: ir.Type) -> Any:
        """Argument i's data as a pointer to ``kind``."""
        return self.builder.bitcast(self.array(i).data, kind.as_pointer())

    def stride(self, i: int) -> Any:
        """Bytes from an entry of the first dimension of argument i to the next."""
        return cgutils.unpack_tuple(self.builder, self.array(i).strides)[0]

    def row(self, i: int, index: Any, kind: ir.Type) -> Any:
        """A pointer to ``kind`` at entry ``index`` of argument i's first dimension."""
        bytes_ = self.builder.bitcast(self.array(i).data, ir.IntType(8).as_pointer())
        there = self.builder.gep(bytes_, [self.builder.mul(index, self.stride(i))])
        return self.builder.bitcast(there, kind.as_pointer())

    def at(self, pointer: Any, index: Any) -> Any:
        """Address of an element."""
        return self.builder.gep(pointer, [index if isinstance(index, ir.Value) else self.size(index)])

    def load(self, pointer: Any, index: Any) -> Any:
        """An element."""
        value = self.builder.load(self.at(pointer, index))
        value.align = 4
        return value

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        """An element."""
        self.builder.store(value, self.at(pointer, index)).align = 4

    def vector(self, pointer: Any, index: Any, kind: ir.VectorType) -> Any:
        """As many elements as there are lanes, from an index on."""
        return self.builder.load(self.builder.bitcast(self.at(pointer, index), kind.as_pointer()), align=1)

    def halves(self, pointer: Any, index: Any) -> Any:
        """As `vector`, of finite float16 (uint16) widened as by `as_float`."""
        narrow = self.vector(pointer, index, ir.VectorType(ir.IntType(16), self.lanes))
        builder, wide = self.builder, self.builder.zext(narrow, self.ints)
        sign = builder.shl(builder.and_(wide, self.every(0x8000)), self.every(16))
        rest = builder.shl(builder.and_(wide, self.every(0x7FFF)), self.every(13))
        bits = builder.bitcast(builder.or_(sign, rest), self.floats)
        return builder.fmul(bits, ir.Constant(self.floats, [2.0**112] * self.lanes))

    def small(self, bytes_: Any, index: Any, bit: Any, width: Any) -> Any:
        """As `vector`, of the fields of ``width`` bits from ``bit`` modulo 8 on, as floats."""
        builder = self.builder
        wide = builder.zext(self.vector(bytes_, index, ir.VectorType(ir.IntType(8), self.lanes)), self.ints)
        shift = self.broadcast(builder.trunc(builder.and_(bit, self.size(7)), _I32), self.ints)
        ones = builder.shl(ir.Constant(_I32, 1), builder.trunc(width, _I32))
        mask = self.broadcast(builder.sub(ones, ir.Constant(_I32, 1)), self.ints)
        return builder.sitofp(builder.and_(builder.lshr(wide, shift), mask), self.floats)

    def size(self, value: int) -> Any:
        """A constant index."""
        return ir.Constant(_SIZE, value)

    def every(self, value: int) -> Any:
        """An integer in every lane."""
        return ir.Constant(self.ints, [value] * self.lanes)

    def broadcast(self, value: Any, kind: ir.VectorType) -> Any:
        """A scalar in every lane."""
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
        lanes = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c, of float vectors, in one instruction where there is one."""
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def accumulators(self, kind: ir.VectorType, n: int, zero: float | int) -> list[Any]:
        """Registers that start at zero."""
        start = ir.Constant(kind, [zero] * kind.count)
        return [cgutils.alloca_once_value(self.builder, start) for _ in range(n)]

    def numbers(self, planes: Any, quad: Any, bits: int, quads: int) -> list[list[Any]]:
        """Words of a tile that hold ``quad`` in their lowest bits and the next ones above: a vector a plane and part."""
        word = self.builder.mul(self.builder.lshr(quad, self.size(3)), self.size(bits * self.parts))
        words = [
            [self.load(planes, self.builder.add(word, self.size(b * self.parts + p))) for p in range(self.parts)]
            for b in range(bits)
        ]
        for i in range(bits * self.parts * self.lanes * 4 // 64):  # hardware does not run ahead far enough
            self.prefetch(self.at(planes, self.builder.add(word, self.size((AHEAD + i * 64) // (self.lanes * 4)))))
        if quads == WORD // QUAD:
            return words
        place = self.builder.shl(self.builder.and_(quad, self.size(7)), self.size(2))
        shift = self.broadcast(self.builder.trunc(place, _I32), self.ints)
        return [[self.builder.lshr(w, shift) for w in plane] for plane in words]

    def prefetch(self, pointer: Any) -> None:
        """Ask for a cache line that is read soon."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        self.builder.call(function, [self.builder.bitcast(pointer, byte), read, keep, data])

    def table(self, tables: Any, quad: Any) -> list[Any]:
        """The 16 sums of a quad, in one register or two, or their address."""
        n = 16 // self.lanes
        first = self.builder.mul(quad, self.size(n))
        if self.level == "none":
            return [self.builder.bitcast(self.at(tables, first), _F32.as_pointer())]
        return [self.load(tables, self.builder.add(first, self.size(i))) for i in range(n)]

    def lookup(self, table: list[Any], index: Any) -> Any:
        """table[index & 15] of every lane."""
        builder, module = self.builder, self.builder.module
        if self.level == "none":
            sums = ir.Constant(self.floats, ir.Undefined)
            low = builder.and_(index, self.every(15))
            for lane in range(self.lanes):
                place = builder.zext(builder.extract_element(low, ir.Constant(_I32, lane)), _SIZE)
                sums = builder.insert_element(sums, self.load(table[0], place), ir.Constant(_I32, lane))
            return sums
        name = "llvm.x86.avx512.permvar.sf.512" if self.level == "avx512" else "llvm.x86.avx2.permps"
        permute = cgutils.get_or_insert_function(module, ir.FunctionType(self.floats, [self.floats, self.ints]), name)
        halves = [builder.call(permute, [half, index]) for half in table]
        if len(halves) == 1:
            return halves[0]
        upper = builder.icmp_signed("<", builder.shl(index, self.every(28)), self.every(0))
        return builder.select(upper, halves[1], halves[0])


@intrinsic
def _lookup_sums(
    typing: Any, planes: Any, tile: Any, tables: Any, token: Any, quad: Any, steps: Any, out: Any, bits: Any, quads: Any
) -> Any:
    """out[32 rows] = Σ_b 2^b Σ over ``steps`` times ``len(quads)`` quads from ``quad`` on; ``len(bits)`` planes.

    planes and tables are whole arrays: a view of a tile or token would cost as much as a short group.
    """
    n_bits, n_quads = bits.count, quads.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args)
        sums, target = e.row(2, args[3], e.floats), e.pointer(6, e.floats)
        source = e.row(0, args[1], e.ints)
        totals = [e.accumulators(e.floats, e.parts, 0.0) for _ in range(n_bits)]
        with cgutils.for_range(builder, args[5]) as loop:
            first = builder.add(args[4], builder.mul(loop.index, e.size(n_quads)))
            words = e.numbers(source, first, n_bits, n_quads)
            for k in range(n_quads):
                table = e.table(sums, builder.add(first, e.size(k)))
                for b in range(n_bits):
                    for p in range(e.parts):
                        index = builder.lshr(words[b][p], e.every(4 * k)) if k else words[b][p]
                        value = builder.fadd(builder.load(totals[b][p]), e.lookup(table, index))
                        builder.store(value, totals[b][p])
        for p in range(e.parts):
            total = builder.load(totals[0][p])
            for b in range(1, n_bits):
                weighted = builder.fmul(builder.load(totals[b][p]), ir.Constant(e.floats, [float(1 << b)] * e.lanes))
                total = builder.fadd(total, weighted)
            e.store(total, target, p)
        return context.get_dummy_value()

    return types.void(planes, tile, tables, token, quad, steps, out, bits, quads), emit


@intrinsic
def _byte_sums(
    typing: Any, planes: Any, tile: Any, x: Any, token: Any, quad: Any, steps: Any, out: Any, bits: Any, quads: Any,
    tokens: Any,
) -> Any:  # fmt: skip
    """out[token, 32 rows] = Σ code · x over quads as in `_lookup_sums`, for the ``len(tokens)`` rows of x (four int8 a word) from ``token`` on."""
    n_bits, n_quads, n_tokens = bits.count, quads.count, tokens.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args)
        vectors = ir.FunctionType(e.ints, [e.ints, e.ints])
        permute = cgutils.get_or_insert_function(builder.module, vectors, "llvm.x86.avx512.permvar.si.512")
        three = ir.FunctionType(e.ints, [e.ints, e.ints, e.ints])
        dot = cgutils.get_or_insert_function(builder.module, three, "llvm.x86.avx512.vpdpbusd.512")
        source, inputs, target = e.row(0, args[1], e.ints), e.row(2, args[3], _I32), e.pointer(6, e.ints)
        stride = builder.sdiv(e.stride(2), e.size(4))
        totals = [e.accumulators(e.ints, e.parts, 0) for _ in range(n_tokens)]
        spread = [
            ir.Constant(e.ints, [sum(((m >> i) & 1) << (8 * i) for i in range(4)) << b for m in range(16)])
            for b in range(n_bits)
        ]
        with cgutils.for_range(builder, args[5]) as loop:
            first = builder.add(args[4], builder.mul(loop.index, e.size(n_quads)))
            words = e.numbers(source, first, n_bits, n_quads)
            for k in range(n_quads):
                codes = []
                for p in range(e.parts):
                    shifted = [builder.lshr(words[b][p], e.every(4 * k)) for b in range(n_bits)]
                    code = builder.call(permute, [spread[0], shifted[0]])
                    for b in range(1, n_bits):
                        code = builder.or_(code, builder.call(permute, [spread[b], shifted[b]]))
                    codes.append(code)
                here = builder.add(first, e.size(k))
                for t in range(n_tokens):
                    four = e.load(inputs, builder.add(here, builder.mul(stride, e.size(t))))
                    values = e.broadcast(four, e.ints)
                    for p in range(e.parts):
                        builder.store(builder.call(dot, [builder.load(totals[t][p]), codes[p], values]), totals[t][p])
        for t in range(n_tokens):
            for p in range(e.parts):
                e.store(builder.load(totals[t][p]), target, t * e.parts + p)
        return context.get_dummy_value()

    return types.void(planes, tile, x, token, quad, steps, out, bits, quads, tokens), emit


@intrinsic
def as_float(typing: Any, value: Any) -> Any:
    """A float32 as it is, or the bits of a finite float16 (uint16) widened: shifted into place, then rescaled by 2^112."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        wide = builder.zext(args[0], _I32)
        sign = builder.shl(builder.and_(wide, ir.Constant(_I32, 0x8000)), ir.Constant(_I32, 16))
        rest = builder.shl(builder.and_(wide, ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 13))
        return builder.fmul(builder.bitcast(builder.or_(sign, rest), _F32), ir.Constant(_F32, 2.0**112))

    return types.float32(value), emit


@njit(**_OPTIONS)
def _unpack_small(data, width, first, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Numbers of `SmallInts` for the rows of a tile: out [G, 32 rows]."""
    mask = np.uint8((1 << width) - 1)
    for g in range(out.shape[0]):
        row, shift = data[g * width >> 3], np.uint8(g * width & 7)
        for lane in range(TILE):
            out[g, lane] = np.float32(np.uint8(np.uint8(row[np.uint64(first + lane)] >> shift) & mask))


@njit(**_OPTIONS)
def _read_grid(grid, tile, scale, zero):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Scales and zero points of a tile's rows, [G, 32 rows] each."""
    base, zeros, zero_width, one_zero, codes, code_width, step, shared = grid
    first = tile * TILE
    if codes.size:
        _unpack_small(codes, code_width, first, scale)
        for g in range(scale.shape[0]):
            for lane in range(TILE):
                of = min((first + lane) // shared, base.shape[1] - 1)
                scale[g, lane] = as_float(base[g, of]) + scale[g, lane] * as_float(step[g, of])  # type: ignore[call-arg]
    else:
        for g in range(scale.shape[0]):
            row = base[g]
            for lane in range(TILE):
                scale[g, lane] = as_float(row[np.uint64(first + lane)])  # type: ignore[call-arg]
    if zeros.size:
        _unpack_small(zeros, zero_width, first, zero)
    else:
        zero[:] = one_zero


@njit(parallel=True, **_OPTIONS)
def _multiply(planes, tables, sums, grid, group_quads, y, bits, quads):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    steps, (n_tokens, n_groups) = group_quads // len(quads), sums.shape
    for tile in prange(planes.shape[0]):
        scale, zero = np.empty((n_groups, TILE), np.float32), np.empty((n_groups, TILE), np.float32)
        out, total = np.empty(TILE, np.float32), np.zeros((n_tokens, TILE), np.float32)
        _read_grid(grid, tile, scale, zero)
        for g in range(n_groups):
            for n in range(n_tokens):
                _lookup_sums(planes, tile, tables, n, g * group_quads, steps, out, bits, quads)  # type: ignore[call-arg]
                for lane in range(TILE):
                    total[n, lane] += scale[g, lane] * (out[lane] - zero[g, lane] * sums[n, g])
        for n in range(n_tokens):
            for lane in range(TILE):
                y[n, tile * TILE + lane] = total[n, lane]


@njit(parallel=True, **_OPTIONS)
def _multiply_bytes(planes, x, sums, x_scale, offset, grid, group_quads, y, bits, quads, tokens):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    """Rows of x come in blocks of ``len(tokens)``; the first of every block is ones."""
    steps, n_groups = group_quads // len(quads), sums.shape[1]
    for tile in prange(planes.shape[0]):
        scale, zero = np.empty((n_groups, TILE), np.float32), np.empty((n_groups, TILE), np.float32)
        out, total = np.empty((len(tokens), TILE), np.int32), np.empty((len(tokens), TILE), np.float32)
        _read_grid(grid, tile, scale, zero)
        for first in range(0, x.shape[0], len(tokens)):
            total[:] = 0
            for g in range(n_groups):
                _byte_sums(planes, tile, x, first, g * group_quads, steps, out, bits, quads, tokens)  # type: ignore[call-arg]
                for n in range(1, len(tokens)):
                    for lane in range(TILE):
                        ones = np.float32(out[0, lane]) - zero[g, lane] * sums[first, g]
                        own = np.float32(out[n, lane]) - zero[g, lane] * sums[first + n, g]
                        total[n, lane] += scale[g, lane] * (own + offset[first + n] * ones)
            for n in range(1, len(tokens)):
                for lane in range(TILE):
                    y[first + n, tile * TILE + lane] = total[n, lane] * x_scale[first + n]


@njit(**_OPTIONS)
def _tables(x, tables):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The 16 sums of subsets of every four inputs; too little work to wake threads for."""
    for n in range(x.shape[0]):
        for q in range(tables.shape[1]):
            table = tables[n, q]
            table[0] = np.float32(0)
            for i in range(QUAD):
                for m in range(1 << i):
                    table[(1 << i) + m] = table[m] + x[n, q * QUAD + i]


@njit(parallel=True, **_OPTIONS)
def _pack(codes, planes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    n_words, bits = planes.shape[1], planes.shape[2]
    for tile in prange(planes.shape[0]):
        for lane in range(TILE):
            row = codes[tile * TILE + lane]
            for w in range(n_words):
                for b in range(bits):
                    word = np.uint32(0)
                    for k in range(WORD):
                        word |= np.uint32(np.uint32(row[w * WORD + k] >> b) & np.uint32(1)) << np.uint32(k)
                    planes[tile, w, b, lane] = word


@njit(parallel=True, **_OPTIONS)
def _expand(planes, grid, group, first, weight, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Values of tiles ``first`` on, transposed: weight float32 [columns, rows]."""
    n_groups = grid[0].shape[0]
    for t in prange(weight.shape[1] // TILE):
        tile = first + t
        scale, zero = np.empty((n_groups, TILE), np.float32), np.empty((n_groups, TILE), np.float32)
        _read_grid(grid, tile, scale, zero)
        for column in range(planes.shape[1] * WORD):
            g = min(column // group, n_groups - 1)  # behind the last group: codes are zero and inputs too
            words, k = planes[tile, column // WORD], np.uint32(column % WORD)
            out = weight[column, t * TILE : (t + 1) * TILE]
            for lane in range(TILE):
                code = np.uint32(0)
                for b in range(len(bits)):
                    code |= np.uint32(np.uint32(words[b, lane] >> k) & np.uint32(1)) << np.uint32(b)
                out[lane] = scale[g, lane] * (np.float32(np.int32(code)) - zero[g, lane])


class BitPlanes:
    """int32 [tiles, words, bits, 32 rows]: bit k of a word is that of column k of its 32."""

    name = "planes"

    def instructions(self) -> str:
        """See `vector_level`."""
        return vector_level()

    def usual(self, bits: int) -> int:
        """See `TwoWays`."""
        return LOOKED_UP // bits

    def pack(self, codes: Tensor, bits: int) -> tuple[Tensor, ...]:
        """Codes uint8 [rows, columns], both filled up."""
        share_threads()
        rows, columns = codes.shape
        planes = torch.empty(rows // TILE, columns // WORD, bits, TILE, dtype=torch.int32)
        _pack(codes.contiguous().numpy(), planes.numpy().view(np.uint32))
        return (planes,)

    def unpack(self, stored: tuple[Tensor, ...], bits: int) -> Tensor:
        """The codes uint8 [rows, columns] again."""
        (planes,) = stored
        places = torch.arange(WORD, dtype=torch.int32)
        codes = torch.zeros(planes.shape[0], TILE, planes.shape[1], WORD, dtype=torch.uint8)
        for b in range(bits):
            plane = planes[:, :, b].transpose(1, 2).unsqueeze(-1)
            codes |= (((plane >> places) & 1) << b).to(torch.uint8)
        return codes.view(planes.shape[0] * TILE, -1)

    def arguments(self, weight: PackedWeight) -> tuple[Any, ...]:
        """Words, grid, and what names the compiled variant."""
        words = weight.stored[0].numpy().view(np.uint32)
        return words, grid_arrays(weight.grid), _quads(weight.group), (0,) * weight.bits

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`: looked up for few tokens, expanded tile by tile for many."""
        by_codes = is_multiplied(self, weight.bits, x.shape[0])
        return self.multiplied(x, weight) if by_codes else self.expanded(x, weight)

    def expanded(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `TwoWays`."""
        share_threads()
        words, grid, _, bits = weight.once(self.arguments)
        return by_expansion(
            x.float(), words.shape, lambda first, out: _expand(words, grid, weight.group, first, out, bits)
        )

    def multiplied(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `TwoWays`: sums of subsets of inputs are looked up."""
        share_threads()
        x = x.float()
        words, grid, quads, bits = weight.once(self.arguments)
        y = torch.empty(x.shape[0], words.shape[0] * TILE)
        tables = np.empty((x.shape[0], x.shape[1] // QUAD, 16), np.float32)
        _tables(x.numpy(), tables)
        sums = _group_sums(x, weight).numpy()
        _multiply(words, tables, sums, grid, weight.group // QUAD, y.numpy(), bits, quads)
        return y

    def takes_integers(self, weight: PackedWeight, n: int) -> bool:
        """Wherever the CPU multiplies bytes (benchmarks/results/packed.md compares it with float inputs: for one token either
        may be ahead, from 8 tokens on integers are)."""
        return has_byte_products()

    def integer_matmul(self, x: Tensor, scale: Tensor, offset: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`. Blocks of tokens are led by a row of ones; without byte products, by the floats they stand for."""
        if not has_byte_products():
            return self.matmul(floats_of(x, scale, offset, weight), weight)
        share_threads()
        n = x.shape[0]
        size = next((t for t in TOKENS if t > n), TOKENS[-1])
        blocks = -(-n // (size - 1))
        inputs, factors = x.new_zeros(blocks, size, x.shape[1]), scale.new_zeros(2, blocks, size)
        inputs[:, 0] = weight.ones
        if n < blocks * (size - 1):  # the last block is filled up
            x, scale, offset = (
                F.pad(t, (0,) * (2 * t.dim() - 1) + (blocks * (size - 1) - n,)) for t in (x, scale, offset)
            )
        inputs[:, 1:] = x.view(blocks, size - 1, -1)
        factors[:, :, 1:] = torch.stack([scale, offset]).view(2, blocks, -1)
        inputs, factors = inputs.flatten(0, 1), factors.flatten(1)
        words, grid, quads, bits = weight.once(self.arguments)
        y = torch.empty(inputs.shape[0], words.shape[0] * TILE)
        _multiply_bytes(
            words, inputs.numpy().view(np.int32), _group_sums(inputs, weight).numpy(), factors[0].numpy(),
            factors[1].numpy(), grid, weight.group // QUAD, y.numpy(), bits, quads, (0,) * size,
        )  # fmt: skip
        return y.view(blocks, size, -1)[:, 1:].flatten(0, 1)[:n]


def by_expansion(x: Tensor, shape: Sequence[int], expand: Callable[[int, np.ndarray], None]) -> Tensor:
    """x float32 [n, columns] times a weight in words of this shape; expand writes the values of tiles from a first one on,
    float32 [columns, rows]."""
    n_tiles, columns = shape[0], shape[1] * WORD
    y = torch.empty(x.shape[0], n_tiles * TILE)
    step = max(1, EXPANDED // (columns * TILE))
    for first in range(0, n_tiles, step):
        last = min(n_tiles, first + step)
        values = torch.empty(columns, (last - first) * TILE)
        expand(first, values.numpy())
        torch.mm(x, values, out=y[:, first * TILE : last * TILE])
    return y


def _quads(group: int) -> tuple[int, ...]:
    """As long as the quads that a step takes."""
    return (0,) * next(n for n in STEPS if group // QUAD % n == 0)


def _group_sums(x: Tensor, weight: PackedWeight) -> Tensor:
    """Sums of inputs over every group, float32 [n, G]."""
    own = x[:, : weight.n_groups * weight.group]
    return own.reshape(x.shape[0], weight.n_groups, weight.group).sum(-1, dtype=torch.float32)


def grid_arrays(grid: PackedGrid) -> tuple:
    """Scales and zero points as the compiled loops read them."""
    none = np.empty((0, 0), np.uint8)
    floats = _float_bits(grid.scale)
    zeros, width, one = none, 1, np.float32(0)
    if isinstance(grid.zero, SmallInts):
        zeros, width = grid.zero.data.numpy(), grid.zero.width
    else:
        one = np.float32(grid.zero)
    if grid.codes is None or grid.step is None:
        return floats, zeros, width, one, none, 1, floats, 1
    return floats, zeros, width, one, grid.codes.data.numpy(), grid.codes.width, _float_bits(grid.step), grid.shared


def _float_bits(values: Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16) if values.dtype == torch.float16 else values.numpy()
