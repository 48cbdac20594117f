"""Packing solved weights in the layout of a device's kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.core.errors import InputError
from quant.core.levels import TABLES, levels_of
from quant.core.names import UNPACKED
from quant.core.types import BilevelScales, Grid, Outliers, QuantizedWeight, QuantSpec
from quant.kernels.matmul.weight import (
    QUAD,
    TILE,
    WORD,
    Expanded,
    Layout,
    PackedColumns,
    PackedGrid,
    PackedWeight,
    SmallInts,
    SparseRows,
    arrange,
    pack_small,
)

log = logging.getLogger(__name__)


@cache
def layout_of(device: torch.device) -> Layout:
    """The layout of a device's kernels. On CUDA without Triton: one warning, and a byte a code."""
    if device.type == "cpu":
        from quant.kernels.matmul.cpu import BitPlanes, vector_level
        from quant.kernels.matmul.cpu_fields import FieldTiles

        return BitPlanes() if vector_level() == "avx512" else FieldTiles()
    if device.type == "cuda":
        try:
            from quant.kernels.matmul.cuda import Fields

            return Fields()
        except ImportError as error:
            log.warning(
                "Triton is not usable (%s): packed weights take a byte a code and are multiplied by torch", error
            )
    return Expanded()


def rounding_layout(device: torch.device) -> Layout:
    """The layout whose products round inputs to 8 bits. Raises InputError where there is none."""
    if device.type == "cpu":
        from quant.kernels.matmul.cpu_bytes import ByteTiles

        if ByteTiles.runs_here():
            return ByteTiles()
    raise InputError("--round-inputs needs --device cpu, and a CPU with AVX2: leave it out")


def pack_weight(
    weight: QuantizedWeight, device: torch.device | str = "cpu", layout: Layout | None = None
) -> PackedWeight:
    """A solver's answer, packed for a device, in another layout than its own where one is given; nothing is rounded."""
    weight, device = in_integers(weight), torch.device(device)
    layout = layout_of(device) if layout is None else layout
    weight = weight.to(device)
    (n_out, n_in), grid = weight.codes.shape, weight.grid
    codes, order = weight.codes, None
    if not weight.has_plain_groups():
        order = torch.argsort(grid.g_idx, stable=True)
        codes = codes[:, order]
    own = -(-n_in // grid.n_groups)
    fill = WORD if grid.n_groups == 1 else QUAD
    group = -(-own // fill) * fill
    rows = -n_out % TILE
    codes = F.pad(arrange(codes, grid.n_groups, group), (0, 0, 0, rows))
    bits = weight.spec.code_bits
    zero: SmallInts | int = weight.spec.numbers.middle
    minimum = None
    if grid.minimum is not None:
        zero, minimum = 0, _stored(F.pad(grid.minimum.T, (0, rows)).contiguous(), grid.minimum_bits)
    elif not weight.spec.symmetric:
        zero = pack_small(F.pad(grid.zero.T, (0, rows)), bits)
    scale = _stored(F.pad(grid.scale.T, (0, rows)).contiguous(), grid.scale_bits)
    packed_grid = PackedGrid(scale, zero, minimum=minimum)
    if grid.bilevel is not None:
        packed_grid = _bilevel(grid.bilevel, packed_grid, rows)
    outliers = None if weight.outliers is None else _pack_outliers(weight.outliers, n_out, n_in)
    return PackedWeight(layout, bits, n_out, n_in, group, layout.pack(codes, bits), packed_grid, order, outliers)


def in_integers(weight: QuantizedWeight) -> QuantizedWeight:
    """The same values as codes of evenly spaced levels, of more bits where need be: those of E2M1 are halves, those of IQ4_NL
    integers. Raises InputError for E4M3, which spans 18 powers of two."""
    spec, grid = weight.spec, weight.grid
    if spec.level_kind is None:
        return weight
    if spec.kind in UNPACKED:
        raise InputError(
            "packed products are of at most 256 evenly spaced levels, and not of fp8: leave --real_quant out"
        )
    finest = 1.0 if spec.kind == "iq4_nl" else 0.5
    steps = levels_of(weight.codes, TABLES[spec.kind]) / finest
    middle, bits = (128, 8) if spec.kind == "iq4_nl" else (16, 5)
    even = QuantSpec(bits, spec.group_size, True)
    zero = torch.full_like(grid.zero, middle)
    own = Grid(grid.scale * finest, zero, grid.g_idx, even.qmax)
    return replace(weight, codes=(steps + middle).to(torch.uint8), grid=own, spec=even)


def pack_block(
    solved: Mapping[str, QuantizedWeight], device: torch.device, layout: Layout | None = None
) -> dict[str, PackedWeight]:
    """The answers of a block's linears, packed, by the names of their weights."""
    return {name: pack_weight(weight, device, layout) for name, weight in solved.items()}


def _stored(numbers: Tensor, bits: int) -> Tensor:
    return numbers.half() if bits == 16 else numbers


def _bilevel(level: BilevelScales, grid: PackedGrid, rows: int) -> PackedGrid:
    codes = pack_small(F.pad(level.codes.T, (0, rows)), level.bits)
    return replace(
        grid, scale=level.base.T.contiguous(), codes=codes, step=level.step.T.contiguous(), shared=level.rows
    )


def _pack_outliers(outliers: Outliers, n_out: int, n_in: int) -> SparseRows | PackedColumns:
    if outliers.whole_columns:
        columns = outliers.index[: outliers.index.numel() // n_out]
        return PackedColumns(columns.int(), outliers.value.view(n_out, -1))
    counts = torch.bincount(outliers.index // n_in, minlength=n_out)
    rows = F.pad(counts.cumsum(0), (1, 0)).int()
    columns = outliers.index % n_in
    return SparseRows(rows, columns.short() if n_in <= 1 << 16 else columns.int(), outliers.value)
