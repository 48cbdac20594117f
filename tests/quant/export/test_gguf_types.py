"""Codes in GGUF's blocks: dequantized by the gguf package and by a slow reading of the format, they are the solver's values."""

import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from quant.core.errors import InputError
from quant.core.levels import TABLES
from quant.core.types import Grid, QuantizedWeight, QuantSpec, group_index
from quant.export import gguf_blocks
from quant.export.gguf_types import TYPES, encode, nearest, type_for, type_of
from tests.helpers import random_weight

CASES = [  # bits, group, symmetric, kind, columns, the type in which it is exact
    (1, -1, False, "integer", 256, "Q2_K"), (2, -1, False, "integer", 512, "Q2_K"), (2, 256, True, "integer", 512, "Q2_K"),
    (2, -1, False, "real", 256, "Q2_K"), (1, -1, False, "real", 256, "Q2_K"), (2, 512, False, "real", 1024, "Q2_K"),
    (3, -1, True, "integer", 256, "Q3_K"), (3, 256, True, "integer", 512, "Q3_K"),
    (2, 32, False, "integer", 96, "Q4_0"), (3, 64, False, "integer", 128, "Q4_0"), (3, -1, False, "integer", 256, "Q4_0"),
    (4, 32, True, "integer", 64, "Q4_0"), (4, -1, True, "integer", 96, "Q4_0"), (4, 128, True, "integer", 256, "Q4_0"),
    (1, 32, False, "integer", 32, "Q4_0"), (4, 256, False, "integer", 256, "Q4_K"), (3, -1, False, "real", 256, "Q4_K"),
    (4, -1, False, "real", 768, "Q4_K"), (4, 32, False, "real", 96, "Q4_1"), (2, 32, False, "real", 64, "Q4_1"),
    (3, 64, False, "real", 128, "Q4_1"), (4, 32, False, "integer", 96, "Q5_0"), (4, 128, False, "integer", 256, "Q5_0"),
    (5, 32, True, "integer", 64, "Q5_0"), (5, -1, False, "integer", 256, "Q5_K"), (5, -1, False, "real", 512, "Q5_K"),
    (5, 32, False, "real", 64, "Q5_1"), (6, -1, True, "integer", 256, "Q6_K"), (6, 512, True, "integer", 512, "Q6_K"),
    (5, 32, False, "integer", 64, "Q8_0"), (6, 32, True, "integer", 64, "Q8_0"), (7, 64, False, "integer", 64, "Q8_0"),
    (4, 32, False, "iq4_nl", 96, "IQ4_NL"), (8, 32, True, "integer", 96, "Q8_0"), (8, -1, True, "integer", 256, "Q8_0"),
]  # fmt: skip


def slow_row(row, kind):
    """One row of blocks, value by value in exact arithmetic of float64, from the layout in ggml-common.h."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    values = []
    for start in range(0, len(row), size):
        block = bytes(row[start : start + size])
        values += [slow_value(kind, block, i) for i in range(columns)]
    return values


def half(raw):
    return struct.unpack("<e", raw)[0]


def six(scales, i):
    """Scale and minimum of part i of Q4_K and Q5_K."""
    if i < 4:
        return scales[i] % 64, scales[i + 4] % 64
    return (
        scales[i + 4] % 16 + scales[i - 4] // 64 * 16,
        scales[i + 4] // 16 + scales[i] // 64 * 16,
    )


def slow_value(kind, b, i):
    byte, upper = (i % 16, i // 16) if kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.IQ4_NL) else (0, 0)
    four = lambda at: (b[at + byte] >> 4 * upper) % 16  # noqa: E731
    if kind == Type.IQ4_NL:
        return half(b[:2]) * TABLES["iq4_nl"][four(2)]
    bit = lambda at, n: (b[at + n // 8] >> n % 8) % 2  # noqa: E731
    two = lambda at: (b[at + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2) % 4  # noqa: E731
    if kind == Type.Q4_0:
        return half(b[:2]) * (four(2) - 8)
    if kind == Type.Q4_1:
        return half(b[:2]) * four(4) + half(b[2:4])
    if kind == Type.Q5_0:
        return half(b[:2]) * (four(6) + 16 * bit(2, i) - 16)
    if kind == Type.Q5_1:
        return half(b[:2]) * (four(8) + 16 * bit(4, i)) + half(b[2:4])
    if kind == Type.Q8_0:
        return half(b[:2]) * struct.unpack("b", b[2 + i : 3 + i])[0]
    if kind == Type.Q2_K:
        part = b[i // 16]
        return half(b[80:82]) * (part % 16) * two(16) - half(b[82:84]) * (part // 16)
    if kind == Type.Q3_K:
        part = i // 16
        low = b[96 + part % 8] >> (4 if part >= 8 else 0) & 15
        scale = low + (b[96 + 8 + part % 4] >> part // 4 * 2) % 4 * 16
        high = (b[i % 32] >> i // 32) % 2
        return half(b[108:110]) * (scale - 32) * (two(32) + 4 * high - 4)
    if kind in (Type.Q4_K, Type.Q5_K):
        scale, minimum = six(b[4:16], i // 32)
        at = 16 if kind == Type.Q4_K else 48
        code = (b[at + i // 64 * 32 + i % 32] >> i % 64 // 32 * 4) % 16
        if kind == Type.Q5_K:
            code += 16 * ((b[16 + i % 32] >> i // 32) % 2)
        return half(b[:2]) * scale * code - half(b[2:4]) * minimum
    if kind == Type.Q6_K:
        part, j = i // 128, i % 128
        low = b[part * 64 + j % 64] >> (4 if j >= 64 else 0) & 15
        high = (b[128 + part * 32 + j % 32] >> j // 32 * 2) % 4
        return half(b[208:210]) * struct.unpack("b", b[192 + i // 16 : 193 + i // 16])[0] * (low + 16 * high - 32)
    raise AssertionError(kind)


def check_values(weight, kind):
    data = encode(weight, kind)
    ours = weight.dequantize()
    assert data.dtype == np.uint8
    assert torch.equal(torch.from_numpy(np.array(gguf.dequantize(data, kind.type))), ours)
    slow = torch.tensor([slow_row(row, kind.type) for row in data], dtype=torch.float64)
    scale, base = (t.double() for t in weight.grid.expand())
    real = weight.grid.minimum is not None
    exact = weight.codes * scale + base if real else (weight.codes - base) * scale
    if weight.grid.table is not None:
        exact = torch.tensor(weight.grid.table, dtype=torch.float64)[weight.codes.long()] * scale
    assert torch.equal(slow, exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_type_holds_its_grids_to_the_bit(case):
    bits, group, symmetric, kind, n_in, named = case
    spec = QuantSpec(bits, group, symmetric, kind=kind)
    weight = random_weight(3, n_in, spec)
    chosen = type_for(spec, n_in)
    assert chosen is not None and chosen.type.name == named and type_of(weight) == chosen
    check_values(weight, chosen)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.type.name)
def test_extreme_codes_and_zero_points(kind):
    """All codes of a type at either end, the smallest float16 scales, zero points at both ends."""
    columns = 256
    code = torch.arange(columns).repeat(6, 1) % kind.levels
    if kind.type == Type.IQ4_NL:
        spec = QuantSpec(4, 32, kind="iq4_nl")
        scale = torch.tensor([2.0**-24, 2.0**-14, 1.0, 0.1, 500.0, 3e-5]).half().float()[:, None].repeat(1, 8)
        grid = Grid(scale, torch.zeros(6, 8).int(), group_index(columns, 32), spec.qmax, table=spec.numbers.table)
        check_values(QuantizedWeight(code.to(torch.uint8), grid, spec).check(), kind)
        return
    if kind.centre is None:
        kinds = ("real",) if kind.columns == 32 else ("integer", "real")
        bits = kind.levels.bit_length() - 1
        for grid_kind in kinds:
            spec = QuantSpec(bits, kind.columns, kind=grid_kind)
            groups = columns // kind.columns
            scale = (
                torch.tensor([2.0**-24, 2.0**-14, 1.0, 0.1, 60000 / 31, 3e-5]).half().float()[:, None].repeat(1, groups)
            )
            if grid_kind == "real":
                minimum = torch.tensor([-1.0, 0.0, 65504.0, -65504.0, -0.0, 2.0**-24])[:, None].repeat(1, groups)
                grid = Grid.real(scale, minimum, group_index(columns, kind.columns), spec.qmax)
            else:
                zero = torch.tensor([0, spec.qmax, 1, spec.qmax, 0, 2])[:, None].repeat(1, groups).int()
                grid = Grid(scale, zero, group_index(columns, kind.columns), spec.qmax)
            check_values(QuantizedWeight(code.to(torch.uint8), grid, spec).check(), kind)
        return
    bits = kind.levels.bit_length() - 1
    spec = QuantSpec(bits, kind.columns, symmetric=True)
    scale = (
        torch.tensor([2.0**-24, 2.0**-14, 1.0, 0.1, 500.0, 3e-5])
        .half()
        .float()[:, None]
        .repeat(1, columns // kind.columns)
    )
    zero = torch.full(scale.shape, kind.centre, dtype=torch.int32)
    grid = Grid(scale, zero, group_index(columns, kind.columns), spec.qmax)
    check_values(QuantizedWeight(code.to(torch.uint8), grid, spec).check(), kind)


def test_what_codes_and_zeros_happen_to_be_takes_fewer_bits():
    """Asymmetric 4 bits in groups of 32: 5.5 bits a weight, 5 where scale·zero is a float16 number, 4.5 where codes stay
    within 8 of their zero points."""
    spec = QuantSpec(4, 32)
    weight = random_weight(8, 64, spec)
    assert type_of(weight).type == Type.Q5_0
    short = replace(weight, grid=replace(weight.grid, scale=torch.full_like(weight.grid.scale, 3 * 2.0**-9)))
    assert type_of(short).type == Type.Q4_1 and type_for(spec, 64).type == Type.Q5_0
    check_values(short, type_of(short))
    near = replace(weight, codes=torch.minimum(weight.codes, (weight.grid.expand()[1] + 7).to(torch.uint8)))
    near = replace(near, codes=torch.maximum(near.codes, (weight.grid.expand()[1] - 8).clamp(min=0).to(torch.uint8)))
    assert type_of(near).type == Type.Q4_0
    check_values(near, type_of(near))
    rows = random_weight(4, 256, QuantSpec(3, -1))
    tight = replace(rows, grid=replace(rows.grid, zero=torch.full_like(rows.grid.zero, 4)))
    assert type_of(tight).type == Type.Q3_K
    check_values(tight, type_of(tight))


def test_sub_scales_stand_where_the_package_reads_them():
    """Random scales and minima of the parts of super-blocks, which our own grids leave at one."""
    generator = np.random.default_rng(0)
    d = np.float16([0.5, 0.25]).view(np.uint8).reshape(2, 2)
    for pack, kind, levels, parts, top in (
        (gguf_blocks.q2_k, Type.Q2_K, 4, 16, 16), (gguf_blocks.q4_k, Type.Q4_K, 16, 8, 64), (gguf_blocks.q5_k, Type.Q5_K, 32, 8, 64),
    ):  # fmt: skip
        codes = generator.integers(0, levels, (2, 256), np.uint8)
        scales, minima = generator.integers(0, top, (2, 2, parts), np.uint8)
        data = pack(codes, d, d, scales, minima)
        each = [np.repeat(part.astype(float), 256 // parts, 1) for part in (scales, minima)]
        expected = np.array([[0.5], [0.25]]) * (each[0] * codes - each[1])
        assert np.array_equal(gguf.dequantize(data, kind), expected)
        assert np.array_equal([slow_row(row, kind) for row in data], expected)
    codes, scales = generator.integers(0, 8, (2, 256), np.uint8), generator.integers(0, 64, (2, 16), np.uint8)
    expected = np.array([[0.5], [0.25]]) * (np.repeat(scales.astype(float), 16, 1) - 32) * (codes.astype(float) - 4)
    assert np.array_equal(gguf.dequantize(gguf_blocks.q3_k(codes, d, scales), Type.Q3_K), expected)
    codes, signed = (
        generator.integers(0, 64, (2, 256), np.uint8),
        generator.integers(-128, 128, (2, 16)).astype(np.int8),
    )
    expected = np.array([[0.5], [0.25]]) * np.repeat(signed.astype(float), 16, 1) * (codes.astype(float) - 32)
    assert np.array_equal(gguf.dequantize(gguf_blocks.q6_k(codes, d, signed), Type.Q6_K), expected)


NONE = [
    (QuantSpec(8, 32), 64, "--wbits 8 --group-size 32 --sym"),
    (QuantSpec(6, 32, kind="real"), 64, "--wbits 6 --group-size 32 --grid integer"),
    (QuantSpec(4, 16, True), 64, "--wbits 4 --group-size 64 --sym"),
    (QuantSpec(4, 48), 96, "--wbits 4 --group-size 32"),
    (QuantSpec(8, kind="real"), 256, "--wbits 8 --group-size -1 --sym"),
    (QuantSpec(4), 100, None),
]


@pytest.mark.parametrize("case", NONE, ids=str)
def test_what_no_type_holds_and_the_nearest_that_one_does(case):
    spec, n_in, flags = case
    assert type_for(spec, n_in) is None and nearest(spec, [n_in]) == flags


def test_answers_that_no_type_holds_are_refused():
    with pytest.raises(InputError, match="no type of blocks that holds this grid"):
        type_of(random_weight(4, 64, QuantSpec(8, 32)))
    tiny = random_weight(4, 64, QuantSpec(4, 32, True), scale=1e-9)
    with pytest.raises(InputError, match="scales and minima in float16"):
        type_of(tiny)
    weight = random_weight(4, 64, QuantSpec(4, 32, True))
    turned = replace(weight, grid=replace(weight.grid, g_idx=weight.grid.g_idx.flip(0)))
    with pytest.raises(InputError, match="columns in order"):
        type_of(turned)
    with pytest.raises(ValueError, match="do not fit Q4_0"):
        encode(random_weight(4, 64, QuantSpec(6, 32, True)), next(one for one in TYPES if one.type == Type.Q4_0))
