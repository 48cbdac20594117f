"""Packed products in Triton: codes cut into fields of 8, 4, 2 and 1 bits (3 bits: two of one, one of another), a byte
array each, whose bytes hold consecutive columns.

A block of columns lies inside one group, so that its scale and zero point are one number a row. One token: a program for a
few rows and a share of the columns multiplies and adds in registers, field by field, in words of 32 bits; groups that words do
not fit are read byte by byte. More tokens: tiles of codes less their
zero points are exact in the inputs' dtype and meet them on tensor cores, in float32 sums. Integer inputs are taken as the
floats they stand for. Without a GPU the same code runs in Triton's interpreter, as the tests do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.matmul.weight import WORD, PackedWeight, SmallInts, floats_of

WIDTHS = (8, 4, 2, 1)
COLUMNS = 128  # columns of a block, where groups are multiples of it
ROWS_OF_ONE, ROWS_OF_MANY, TOKENS = 16, 64, 64  # rows of a program, and tokens
WORDS, PROGRAMS = 32, 2048  # words of a row that a program takes at a time for one token, and programs that fill a GPU
DOT = 16  # the least columns that tensor cores take
FUSED = True  # as for the loops over columns
STAGES, STAGES_OF_FLOATS = 3, 2  # tiles that are loaded ahead: as many as 99 KB of shared memory hold


@triton.jit  # type: ignore[untyped-decorator]
def _field(data, row, inside, start, stride, width: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Integers int32 [rows, columns] of one field, from column ``start`` on."""
    column = tl.arange(0, columns)
    place = (start + column) * width
    byte = tl.load(data + row[:, None] * stride + (place // 8)[None, :], mask=inside[:, None], other=0)
    return (byte.to(tl.int32) >> (place % 8)[None, :]) & ((1 << width) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _codes(  # type: ignore[no-untyped-def]
    f0, f1, f2, row, inside, start, n_columns,  # noqa: ANN001
    w0: tl.constexpr, w1: tl.constexpr, w2: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    """Codes int32 [rows, columns] of up to three fields; a width of 0 is none."""
    code = _field(f0, row, inside, start, n_columns * w0 // 8, w0, columns)
    if w1 > 0:
        code += _field(f1, row, inside, start, n_columns * w1 // 8, w1, columns) << w0
    if w2 > 0:
        code += _field(f2, row, inside, start, n_columns * w2 // 8, w2, columns) << (w0 + w1)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def _zero(zeros, row, inside, g, n_rows, one_zero, zero_width: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Zero points of rows in a group, float32; a width of 0 is one number for all."""
    if zero_width == 0:
        return tl.zeros_like(row).to(tl.float32) + one_zero
    place = g * zero_width
    byte = tl.load(zeros + (place // 8) * n_rows + row, mask=inside, other=0).to(tl.int32)
    return ((byte >> (place % 8)) & ((1 << zero_width) - 1)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _field_product(  # type: ignore[no-untyped-def]
    x, field, scale, zeros, row, inside, stride, n_rows, n_columns, one_zero, share, shares,  # noqa: ANN001
    group: tl.constexpr, width: tl.constexpr, with_zero: tl.constexpr, zero_width: tl.constexpr,
    rows: tl.constexpr, words: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    """Sums float32 [rows] of one field's integers, less the zero points if it is the one that has them, times the inputs and the
    scales, over this share of the words."""
    per: tl.constexpr = 32 // width
    total = tl.zeros((rows, words), tl.float32)
    for first in range(share * words, n_columns // per, shares * words):
        place = first + tl.arange(0, words)
        live = place < n_columns // per
        word = tl.load(field + row[:, None] * stride + place[None, :], mask=inside[:, None] & live[None, :], other=0)
        word = word.to(tl.uint32, bitcast=True)  # shifted to the right it drags no sign along
        part, inputs = tl.zeros((rows, words), tl.float32), tl.zeros((words,), tl.float32)
        for p in tl.static_range(per):
            given = tl.load(x + place * per + p, mask=live, other=0.0).to(tl.float32)
            # The integer as the lowest bits of 2^23: a conversion takes four times as long as the three operations of this one.
            bits = ((word >> (p * width)) & ((1 << width) - 1)) | 0x4B000000
            part += (bits.to(tl.float32, bitcast=True) - 8388608.0) * given[None, :]
            inputs += given
        g = tl.zeros_like(place) if group == 0 else place * per // group
        at = g[None, :] * n_rows + row[:, None]
        if with_zero:
            if zero_width == 0:
                part -= one_zero * inputs[None, :]
            else:
                bit = g * zero_width
                at_zero = (bit // 8)[None, :] * n_rows + row[:, None]
                byte = tl.load(zeros + at_zero, mask=inside[:, None] & live[None, :], other=0).to(tl.int32)
                z = (byte >> (bit % 8)[None, :]) & ((1 << zero_width) - 1)
                part -= z.to(tl.float32) * inputs[None, :]
        total += part * tl.load(scale + at, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _one_token(  # type: ignore[no-untyped-def]
    x, f0, f1, f2, scale, zeros, y, n_rows, n_columns, used, one_zero, shares,  # noqa: ANN001
    group: tl.constexpr, w0: tl.constexpr, w1: tl.constexpr, w2: tl.constexpr, zero_width: tl.constexpr,
    rows: tl.constexpr, words: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    inside, share = row < n_rows, tl.program_id(1)
    total = _field_product(
        x, f0, scale, zeros, row, inside, n_columns * w0 // 32, n_rows, used, one_zero, share, shares,
        group, w0, True, zero_width, rows, words,
    )  # fmt: skip
    if w1 > 0:
        total += (1 << w0) * _field_product(
            x, f1, scale, zeros, row, inside, n_columns * w1 // 32, n_rows, used, one_zero, share, shares,
            group, w1, False, 0, rows, words,
        )  # fmt: skip
    if w2 > 0:
        total += (1 << (w0 + w1)) * _field_product(
            x, f2, scale, zeros, row, inside, n_columns * w2 // 32, n_rows, used, one_zero, share, shares,
            group, w2, False, 0, rows, words,
        )  # fmt: skip
    tl.store(y + share * n_rows + row, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _narrow_groups(  # type: ignore[no-untyped-def]
    x, f0, f1, f2, scale, zeros, y, n_rows, n_columns, group, n_groups, one_zero,  # noqa: ANN001
    w0: tl.constexpr, w1: tl.constexpr, w2: tl.constexpr, zero_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    inside = row < n_rows
    total = tl.zeros((rows, columns), tl.float32)
    for start in range(0, n_groups * group, columns):
        g = start // group
        code = _codes(f0, f1, f2, row, inside, start, n_columns, w0, w1, w2, columns).to(tl.float32)
        s = tl.load(scale + g * n_rows + row, mask=inside, other=0.0).to(tl.float32)
        z = _zero(zeros, row, inside, g, n_rows, one_zero, zero_width)
        part = tl.load(x + token * n_columns + start + tl.arange(0, columns)).to(tl.float32)
        total += (code - z[:, None]) * s[:, None] * part[None, :]
    tl.store(y + token * n_rows + row, tl.sum(total, axis=1), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _many_tokens(  # type: ignore[no-untyped-def]
    x, f0, f1, f2, scale, zeros, y, n_tokens, n_rows, n_columns, group, n_groups, one_zero,  # noqa: ANN001
    w0: tl.constexpr, w1: tl.constexpr, w2: tl.constexpr, zero_width: tl.constexpr,
    tokens: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    token = (tl.program_id(1) * tokens + tl.arange(0, tokens)).to(tl.int64)
    inside, given = row < n_rows, token < n_tokens
    total = tl.zeros((tokens, rows), tl.float32)
    for start in range(0, n_groups * group, columns):
        g = start // group
        code = _codes(f0, f1, f2, row, inside, start, n_columns, w0, w1, w2, columns).to(tl.float32)
        s = tl.load(scale + g * n_rows + row, mask=inside, other=0.0).to(tl.float32)
        z = _zero(zeros, row, inside, g, n_rows, one_zero, zero_width)
        column = start + tl.arange(0, columns)
        part = tl.load(x + token[:, None] * n_columns + column[None, :], mask=given[:, None], other=0.0)
        exact = (code - z[:, None]).to(part.dtype)  # integers of at most 8 bits and a sign
        total += tl.dot(part, tl.trans(exact), input_precision="tf32x3") * s[None, :]
    tl.store(y + token[:, None] * n_rows + row[None, :], total, mask=given[:, None] & inside[None, :])


def widths_of(bits: int) -> tuple[int, ...]:
    """Widths of the fields that make up a code, lowest bits first: 7 bits are 4, 2 and 1."""
    widths, rest = [], bits
    for width in WIDTHS:
        if rest >= width:
            widths.append(width)
            rest -= width
    return tuple(widths)


def _of_one_token(
    x: Tensor,
    fields: list[Tensor],
    scale: Tensor,
    zeros: Tensor,
    weight: PackedWeight,
    one_zero: float,
    fixed: dict[str, Any],
) -> Tensor:
    """Products float32 [1, rows] with x [columns]. Programs have a warp each and share rows and columns so that there are PROGRAMS
    of them or more: what the columns' parts give is added here, always in one order."""
    n_rows, used = fields[0].shape[0], weight.n_groups * weight.group
    tiles, most = triton.cdiv(n_rows, ROWS_OF_ONE), triton.cdiv(used * fixed["w0"] // WORD, WORDS)
    shares = max(1, min(most, PROGRAMS // tiles))
    parts = torch.empty(shares, n_rows, device=x.device)
    _one_token[(tiles, shares)](
        x, *fields, scale, zeros, parts, n_rows, x.shape[0], used, one_zero, shares,
        group=0 if weight.n_groups == 1 else weight.group, rows=ROWS_OF_ONE, words=WORDS, num_warps=1, **fixed,
    )  # fmt: skip
    return parts if shares == 1 else parts.sum(0, keepdim=True)


class Fields:
    """uint8 [rows, columns · width / 8] a field."""

    def pack(self, codes: Tensor, bits: int) -> tuple[Tensor, ...]:
        """Codes uint8 [rows, columns], filled up."""
        fields, shift = [], 0
        for width in widths_of(bits):
            per = 8 // width
            parts = ((codes >> shift) & (2**width - 1)).view(codes.shape[0], -1, per)
            field = parts[..., 0].clone()
            for p in range(1, per):
                field |= parts[..., p] << (p * width)
            fields.append(field)
            shift += width
        return tuple(fields)

    def unpack(self, stored: tuple[Tensor, ...], bits: int) -> Tensor:
        """The codes uint8 [rows, columns] again."""
        codes, shift = torch.zeros((), dtype=torch.uint8, device=stored[0].device), 0
        for field, width in zip(stored, widths_of(bits), strict=True):
            parts = [(field >> (p * width)) & (2**width - 1) for p in range(8 // width)]
            codes = codes | (torch.stack(parts, -1).flatten(1) << shift)
            shift += width
        return codes

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`."""
        n_columns, n_rows = x.shape[1], weight.stored[0].shape[0]
        columns = min(COLUMNS, weight.group & -weight.group)
        widths, grid = widths_of(weight.bits), weight.grid
        fields = [*weight.stored, *[weight.stored[0]] * (3 - len(widths))]
        w0, w1, w2 = (*widths, *[0] * (3 - len(widths)))
        scale = grid.scale if grid.codes is None else grid.scales()
        stored, width, one = (
            (grid.zero.data, grid.zero.width, 0.0) if isinstance(grid.zero, SmallInts) else (scale, 0, grid.zero)
        )
        y = torch.empty(x.shape[0], n_rows, device=x.device)
        common = (n_rows, n_columns, weight.group, weight.n_groups, float(one))
        fixed = {"w0": w0, "w1": w1, "w2": w2, "zero_width": width, "enable_fp_fusion": FUSED}
        if x.shape[0] == 1 and columns >= WORD:
            return _of_one_token(
                x[0], [field.view(torch.int32) for field in fields], scale, stored, weight, float(one), fixed
            )
        if columns < DOT or x.shape[0] == 1:
            _narrow_groups[(triton.cdiv(n_rows, ROWS_OF_ONE), x.shape[0])](
                x, *fields, scale, stored, y, *common, rows=ROWS_OF_ONE, columns=columns, **fixed
            )
            return y
        tokens = min(TOKENS, max(DOT, triton.next_power_of_2(x.shape[0])))
        _many_tokens[(triton.cdiv(n_rows, ROWS_OF_MANY), triton.cdiv(x.shape[0], tokens))](
            x, *fields, scale, stored, y, x.shape[0], *common, tokens=tokens, rows=ROWS_OF_MANY, columns=columns,
            num_stages=STAGES_OF_FLOATS if x.dtype == torch.float32 else STAGES, **fixed,
        )  # fmt: skip
        return y

    def takes_integers(self, weight: PackedWeight, n: int) -> bool:
        """Never: they are exact in float16 and bfloat16 already."""
        return False

    def integer_matmul(self, x: Tensor, scale: Tensor, offset: Tensor, weight: PackedWeight) -> Tensor:
        """See `Layout`."""
        return self.matmul(floats_of(x, scale, offset, weight), weight)
