"""Packed products on a CPU without AVX-512: fields of 8, 4, 2 and 1 bits in tiles of 32 rows, one row a lane of the vector registers.

A code is cut into fields whose widths are powers of two (3 bits: two of one, one of another), widest first and lowest. A
word holds 32 / width consecutive columns of a field; shifted, masked and made floats, the codes of eight rows and a column
are multiplied by that column's input. One token takes a whole tile at a time, more take half of one and share the codes, so
that sums stay in registers. With AVX-512 the bit planes of `cpu` need fewer instructions a code at 1 to 3 bits, and multiply
bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from quant.kernels.matmul.choice import is_multiplied
from quant.kernels.matmul.cpu import _OPTIONS, Emitter, as_float, by_expansion, grid_arrays, vector_level
from quant.kernels.matmul.weight import TILE, WORD, PackedWeight, floats_of
from quant.kernels.threads import share_threads

WIDTHS = (8, 4, 2, 1)
# Tokens up to which codes of one, two or three fields are multiplied as they are where nothing is measured (`choice`); above, rows
# are expanded for the library's product (benchmarks/results/packed.md).
MULTIPLIED = (1024, 96, 48)
TOKENS = 4  # that share the codes, half a tile at a time
STEPS = (8, 4)  # columns taken at a time: compiled variants


def fields_of(bits: int) -> list[tuple[int, int]]:
    """Width and lowest bit of every field of a code."""
    fields, low = [], 0
    for width in WIDTHS:
        if bits - low >= width:
            fields.append((width, low))
            low += width
    return fields


@intrinsic
def _field_sums(
    typing: Any, stored: Any, tile: Any, half: Any, x: Any, token: Any, column: Any, steps: Any, out: Any, bits: Any,
    columns: Any, tokens: Any,
) -> Any:  # fmt: skip
    """out[token, rows] = Σ code · x over ``steps`` times ``len(columns)`` columns from ``column`` on, for the
    ``len(tokens)`` rows of x from ``token`` on; all 32 rows of a tile for one token, those of a ``half`` for more."""
    n_bits, n_columns, n_tokens = bits.count, columns.count, tokens.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args)
        parts = e.parts if n_tokens == 1 else max(1, e.parts // 2)
        source, target = e.row(0, args[1], e.ints), e.pointer(7, e.floats)
        first_part = builder.mul(args[2], e.size(parts))
        inputs = [e.row(3, builder.add(args[4], e.size(t)), e.float) for t in range(n_tokens)]
        totals = [e.accumulators(e.floats, parts, 0.0) for _ in range(n_tokens)]
        with cgutils.for_range(builder, args[6]) as loop:
            here = builder.add(args[5], builder.mul(loop.index, e.size(n_columns)))
            read = _Words(e, source, here, first_part, parts, n_bits, n_columns)
            for j in range(n_columns):
                place = builder.add(here, e.size(j))
                values = [e.broadcast(e.load(inputs[t], place), e.floats) for t in range(n_tokens)]
                for p in range(parts):
                    code = builder.sitofp(read.codes(j, p), e.floats)
                    for t in range(n_tokens):
                        builder.store(e.multiply_add(code, values[t], builder.load(totals[t][p])), totals[t][p])
        for t in range(n_tokens):
            for p in range(parts):
                e.store(builder.load(totals[t][p]), target, builder.add(first_part, e.size(t * e.parts + p)))
        return context.get_dummy_value()

    return types.void(stored, tile, half, x, token, column, steps, out, bits, columns, tokens), emit


class _Words:
    """The words of a step's columns in registers: lowest bits first the first column's."""

    def __init__(
        self, e: Emitter, source: Any, column: Any, first_part: Any, parts: int, bits: int, columns: int
    ) -> None:
        self.e, self.fields = e, fields_of(bits)
        builder = e.builder
        block = builder.mul(builder.lshr(column, e.size(5)), e.size(bits * e.parts))
        block = builder.add(block, first_part)
        within = builder.and_(column, e.size(WORD - 1))
        self.words: list[list[list[Any]]] = []  # of a field, of 32 / width columns, of a part
        for width, low in self.fields:
            bit = builder.mul(within, e.size(width))
            # A block of 32 columns takes ``width`` words of a field, behind those of the fields below.
            within_block = builder.add(builder.lshr(bit, e.size(5)), e.size(low))
            word = builder.add(block, builder.mul(within_block, e.size(e.parts)))
            read = [
                [e.load(source, builder.add(word, e.size(w * e.parts + p))) for p in range(parts)]
                for w in range(max(1, columns * width // WORD))
            ]
            if columns * width < WORD:
                shift = e.broadcast(builder.trunc(builder.and_(bit, e.size(WORD - 1)), ir.IntType(32)), e.ints)
                read = [[builder.lshr(value, shift) for value in own] for own in read]
            self.words.append(read)

    def codes(self, column: int, part: int) -> Any:
        """The codes of a part's rows in a column of the step."""
        builder, whole = self.e.builder, None
        for (width, low), words in zip(self.fields, self.words, strict=True):
            word = words[column * width // WORD][part]
            up = low - column * width % WORD  # where the field's bits are to go, from where they are
            if up:
                word = builder.shl(word, self.e.every(up)) if up > 0 else builder.lshr(word, self.e.every(-up))
            own = builder.and_(word, self.e.every(((1 << width) - 1) << low))
            whole = own if whole is None else builder.or_(whole, own)
        return whole


def _grid_of(
    e: Emitter,
    arrays: tuple[int, int],
    group: Any,
    tile: Any,
    width: Any,
    one_zero: Any,
    is_half: bool,
    has_zeros: bool,
) -> tuple[list[Any], list[Any]]:
    """Scales and zero points of a group in a tile's rows, floats by part; arrays: which arguments hold them."""
    builder, place = e.builder, e.builder.mul(group, width)
    scales = e.row(arrays[0], group, ir.IntType(16) if is_half else e.float)
    lanes = [builder.add(builder.mul(tile, e.size(TILE)), e.size(p * e.lanes)) for p in range(e.parts)]
    factors = [e.halves(scales, lane) if is_half else e.vector(scales, lane, e.floats) for lane in lanes]
    if not has_zeros:
        return factors, [e.broadcast(one_zero, e.floats)] * e.parts
    zeros = e.row(arrays[1], builder.lshr(place, e.size(3)), ir.IntType(8))
    return factors, [e.small(zeros, lane, place, width) for lane in lanes]


@intrinsic
def _add_group(
    typing: Any, scale: Any, zeros: Any, width: Any, one_zero: Any, group: Any, tile: Any, sums: Any, token: Any, out: Any,
    y: Any, tokens: Any,
) -> Any:  # fmt: skip
    """y[token, rows of the tile] += scale[group] (out - zero[group] sums[token, group]), for ``len(tokens)`` tokens.

    zeros: fields of ``width`` bits as `SmallInts` has them, or () where ``one_zero`` is that of all.
    """
    is_half, has_zeros, n_tokens = scale.dtype == types.uint16, isinstance(zeros, types.Array), tokens.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args)
        first, taken = builder.mul(args[5], e.size(TILE)), e.pointer(8, e.floats)
        factors, zero = _grid_of(e, (0, 1), args[4], args[5], args[2], args[3], is_half, has_zeros)
        totals = [e.load(e.row(6, builder.add(args[7], e.size(t)), e.float), args[4]) for t in range(n_tokens)]
        rows = [e.row(9, builder.add(args[7], e.size(t)), e.float) for t in range(n_tokens)]
        for p in range(e.parts):
            lane = builder.add(first, e.size(p * e.lanes))
            for t in range(n_tokens):
                own = e.load(taken, t * e.parts + p)
                own = builder.fsub(own, builder.fmul(zero[p], e.broadcast(totals[t], e.floats)))
                target = builder.bitcast(e.at(rows[t], lane), e.floats.as_pointer())
                builder.store(e.multiply_add(factors[p], own, builder.load(target, align=4)), target, align=4)
        return context.get_dummy_value()

    return types.void(scale, zeros, width, one_zero, group, tile, sums, token, out, y, tokens), emit


@njit(**_OPTIONS)
def _group_sums(x, group, sums):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Sums of inputs [n, columns] over every group."""
    for n in range(sums.shape[0]):
        for g in range(sums.shape[1]):
            total = 0.0
            for i in range(g * group, (g + 1) * group):
                total += x[n, i]
            sums[n, g] = total


@njit(parallel=True, **_OPTIONS)
def _multiply(stored, x, sums, scale, zeros, width, one_zero, group, y, bits, columns, tokens):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    """y, zero before, gets what x times the weight is. What is compiled is small on purpose: a person waits for it."""
    steps, per = group // len(columns), len(tokens)
    for tile in prange(stored.shape[0]):
        out = np.empty((per, TILE), np.float32)
        for first in range(0, x.shape[0], per):
            for g in range(sums.shape[1]):
                for half in range(1 if per == 1 else 2):
                    _field_sums(stored, tile, half, x, first, g * group, steps, out, bits, columns, tokens)  # type: ignore[call-arg]
                _add_group(scale, zeros, width, one_zero, g, tile, sums, first, out, y, tokens)  # type: ignore[call-arg]


@njit(**_OPTIONS)
def _two_level_scales(grid, scale):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Scales [G, rows] of SpQR, written out for one product."""
    base, _, _, _, codes, width, step, shared = grid
    for g in range(scale.shape[0]):
        row, shift = codes[g * width >> 3], np.uint8(g * width & 7)
        for lane in range(scale.shape[1]):
            code = np.uint8(np.uint8(row[lane] >> shift) & np.uint8((1 << width) - 1))
            of = min(lane // shared, base.shape[1] - 1)
            scale[g, lane] = as_float(base[g, of]) + np.float32(code) * as_float(step[g, of])  # type: ignore[call-arg]


@intrinsic
def _expand_group(
    typing: Any, stored: Any, tile: Any, scale: Any, zeros: Any, width: Any, one_zero: Any, group: Any, steps: Any,
    weight: Any, target: Any, bits: Any, columns: Any,
) -> Any:  # fmt: skip
    """Values of a group's ``steps`` times ``len(columns)`` columns: weight [columns, rows] from row 32 ``target`` on."""
    is_half, has_zeros = scale.dtype == types.uint16, isinstance(zeros, types.Array)
    n_bits, n_columns = bits.count, columns.count

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(context, builder, signature, args)
        source = e.row(0, args[1], e.ints)
        factors, zero = _grid_of(e, (2, 3), args[6], args[1], args[4], args[5], is_half, has_zeros)
        first = builder.mul(args[6], builder.mul(args[7], e.size(n_columns)))
        with cgutils.for_range(builder, args[7]) as loop:
            here = builder.add(first, builder.mul(loop.index, e.size(n_columns)))
            read = _Words(e, source, here, e.size(0), e.parts, n_bits, n_columns)
            for j in range(n_columns):
                row = e.row(8, builder.add(here, e.size(j)), e.float)
                for p in range(e.parts):
                    value = builder.fsub(builder.sitofp(read.codes(j, p), e.floats), zero[p])
                    lane = builder.add(builder.mul(args[9], e.size(TILE)), e.size(p * e.lanes))
                    place = builder.bitcast(e.at(row, lane), e.floats.as_pointer())
                    builder.store(builder.fmul(factors[p], value), place, align=4)
        return context.get_dummy_value()

    return types.void(stored, tile, scale, zeros, width, one_zero, group, steps, weight, target, bits, columns), emit


@njit(parallel=True, **_OPTIONS)
def _expand(stored, scale, zeros, width, one_zero, group, first, weight, bits, columns):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    """Values of tiles ``first`` on, transposed: weight float32 [columns, rows]."""
    for t in prange(weight.shape[1] // TILE):
        for g in range(scale.shape[0]):
            _expand_group(  # type: ignore[call-arg]
                stored, first + t, scale, zeros, width, one_zero, g, group // len(columns), weight, t, bits, columns
            )


def _scales(weight: PackedWeight, grid: tuple) -> np.ndarray:
    """Scales [G, rows] as both kernels take them, those in few bits written out."""
    if weight.grid.codes is None:
        return grid[0]
    scale = np.empty((weight.n_groups, weight.stored[0].shape[0] * TILE), np.float32)
    _two_level_scales(grid, scale)
    return scale


class FieldTiles:
    """int32 [tiles, blocks of 32 columns, bits, 32 rows]: of every block, ``width`` words a row of each field."""

    name = "fields"

    def instructions(self) -> str:
        """See `vector_level`."""
        return vector_level()

    def usual(self, bits: int) -> int:
        """See `TwoWays`."""
        return MULTIPLIED[len(fields_of(bits)) - 1]

    def pack(self, codes: Tensor, bits: int) -> tuple[Tensor, ...]:
        """Codes uint8 [rows, columns], both filled up."""
        rows, columns = codes.shape
        blocks = codes.view(rows // TILE, TILE, columns // WORD, WORD).transpose(1, 2).transpose(2, 3).int()
        words = []
        for width, low in fields_of(bits):
            per = WORD // width
            field = (blocks >> low & (1 << width) - 1).unflatten(2, (width, per))
            places = torch.arange(0, WORD, width, dtype=torch.int32)[:, None]
            words.append((field << places).sum(3, dtype=torch.int32))  # of bits apart, so that nothing is carried
        return (torch.cat(words, 2).contiguous(),)

    def unpack(self, stored: tuple[Tensor, ...], bits: int) -> Tensor:
        """The codes uint8 [rows, columns] again."""
        (words,) = stored
        codes = torch.zeros(words.shape[0], words.shape[1], WORD, TILE, dtype=torch.uint8)
        for width, low in fields_of(bits):
            places = torch.arange(0, WORD, width, dtype=torch.int32)[:, None]
            field = words[:, :, low : low + width, None] >> places & (1 << width) - 1
            codes |= (field.flatten(2, 3) << low).to(torch.uint8)
        return codes.permute(0, 3, 1, 2).reshape(words.shape[0] * TILE, -1)

    def arguments(self, weight: PackedWeight) -> tuple[Any, ...]:
        """Words and grid, as both kernels take it; zero points of this one's; what names the compiled variant."""
        steps = (0,) * next(n for n in STEPS if weight.group % n == 0)
        words, grid = weight.stored[0].numpy().view(np.uint32), grid_arrays(weight.grid)
        zeros = (grid[1] if grid[1].size else (), grid[2], grid[3])
        return words, grid, zeros, weight.group, (0,) * weight.bits, steps

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`: as they are for few tokens, expanded tile by tile for many."""
        by_codes = is_multiplied(self, weight.bits, x.shape[0])
        return self.multiplied(x, weight) if by_codes else self.expanded(x, weight)

    def expanded(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `TwoWays`."""
        share_threads()
        words, grid, zeros, group, bits, steps = weight.once(self.arguments)
        scale = _scales(weight, grid)

        def expand(first: int, values: np.ndarray) -> None:
            _expand(words, scale, *zeros, group, first, values, bits, steps)
            values[weight.n_groups * group :] = 0

        return by_expansion(x.float(), words.shape, expand)

    def multiplied(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `TwoWays`."""
        share_threads()
        n, (words, grid, zeros, group, bits, steps) = x.shape[0], weight.once(self.arguments)
        x, scale = x if x.dtype == torch.float32 else x.float(), _scales(weight, grid)
        tokens = (0,) * (1 if n < TOKENS - 1 else TOKENS)
        if n % len(tokens):
            x = F.pad(x, (0, 0, 0, -n % TOKENS))
        given, y = x.numpy(), np.zeros((x.shape[0], words.shape[0] * TILE), np.float32)
        sums = np.empty((len(given), weight.n_groups), np.float32)
        _group_sums(given, group, sums)
        _multiply(words, given, sums, scale, *zeros, group, y, bits, steps, tokens)
        return torch.from_numpy(y if len(y) == n else y[:n])

    def takes_integers(self, weight: PackedWeight, n: int) -> bool:
        """Never: they are multiplied as the floats they stand for."""
        return False

    def integer_matmul(self, x: Tensor, scale: Tensor, offset: Tensor, weight: PackedWeight) -> Tensor:
        """By the floats that the integers stand for."""
        return self.matmul(floats_of(x, scale, offset, weight), weight)
