"""The block loops in Triton: a program for a tile of rows; its slice of the block stays in registers.

A column is picked out of a register tile by a masked sum, which costs as many operations as the rank-one update that
follows; the only memory read inside the loop is the row of the B x B matrix (and the scales where there are groups).
Tiles are as wide as the next power of two, the rest is masked. Without a GPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1), as the tests do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.core.levels import level_tensors
from quant.core.rounding import NumberFormat
from quant.core.stacks import add_times_, parts_of
from quant.kernels.columns.reference import ColumnBlock, Kernels, TorchKernels

ROWS, TRIAL_COLUMNS = 16, 128
MOST_COLUMNS, PART_COLUMNS = 256, 128  # that registers hold: from 512 on kilobytes of a thread's are spilled
FUSED = (
    True  # a product and a sum are rounded once; said, as the default of Triton changes and codes on an edge with it
)


@triton.jit
def _round_half_even(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Nearest integer of |x| < 2^22, ties to even, as torch rounds (adding 1.5·2^23 leaves no fraction bits)."""
    shifted = x + 12582912.0
    return shifted - 12582912.0


@triton.jit
def _nearest(u, scale, zero, qmax):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Codes of u. Far outside the grid the exact integer does not matter, only that the sum stays in range: a zero is at most
    about 2^11 steps away (`quant.core.stored.FINEST_STEP`)."""
    whole = _round_half_even(zero)
    steps = tl.minimum(tl.maximum(tl.math.div_rn(u, scale) + (zero - whole), -4096.0), 4096.0)
    return tl.minimum(tl.maximum(_round_half_even(steps) + whole, 0.0), qmax)


@triton.jit  # type: ignore[untyped-decorator]
def _level(ratio, middles, n_middles: tl.constexpr, digits: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """How many of the ascending middles lie below: the code of the nearest level, a binary digit after the other."""
    found = tl.zeros_like(ratio).to(tl.int32)
    for digit in tl.static_range(digits):
        tried = found + (1 << (digits - 1 - digit))
        middle = tl.load(middles + tried - 1, mask=tried <= n_middles, other=float("inf"))
        found = tl.where(middle < ratio, tried, found)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(u, scale, zero, qmax, levels, middles, n_middles: tl.constexpr, digits: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, E501
    """Code and value of u; of whole steps where there are no middles."""
    if n_middles > 0:
        code = _level(tl.math.div_rn(u, scale), middles, n_middles, digits)
        return code.to(tl.float32), tl.load(levels + code) * scale
    else:  # noqa: RET505 (Triton compiles one of the two)
        q = _nearest(u, scale, zero, qmax)
        return q, (q - zero) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _coordinate_descent(  # type: ignore[no-untyped-def]
    residual, correlation, weight, gram, inverse, scale, zero, group, levels, middles, codes, free, change,  # noqa: ANN001
    n_rows, tiles, n_columns, n_groups, qmax,  # noqa: ANN001
    residual_stride, correlation_stride, weight_stride, codes_stride, free_stride,  # noqa: ANN001
    gram_stride, gram_layer, inverse_layer,  # noqa: ANN001
    rounding: tl.constexpr, has_free: tl.constexpr, one_group: tl.constexpr, n_middles: tl.constexpr, digits: tl.constexpr,
    rows_tile: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    layer = tl.program_id(0) // tiles  # of a stack; n_rows are those of one
    inner = (tl.program_id(0) % tiles) * rows_tile + tl.arange(0, rows_tile)
    row, column = (layer * n_rows + inner).to(tl.int64), tl.arange(0, columns)
    gram += layer.to(tl.int64) * gram_layer
    inverse += layer * inverse_layer
    inside_row, inside_column = inner < n_rows, column < n_columns
    inside = inside_row[:, None] & inside_column[None, :]
    target = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=inside, other=0.0)
    before = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
    c = tl.load(correlation + row[:, None] * correlation_stride + column[None, :], mask=inside, other=0.0)
    current = target - before
    chosen = tl.zeros_like(current)
    s = tl.load(scale + row * n_groups, mask=inside_row, other=1.0)
    z = tl.load(zero + row * n_groups, mask=inside_row, other=0.0)
    for j in range(n_columns):
        here = column[None, :] == j
        old = tl.sum(tl.where(here, current, 0.0), axis=1)
        value = old + tl.sum(tl.where(here, c, 0.0), axis=1) * tl.load(inverse + j)
        if rounding:
            if not one_group:
                g = tl.load(group + j)
                s = tl.load(scale + row * n_groups + g, mask=inside_row, other=1.0)
                z = tl.load(zero + row * n_groups + g, mask=inside_row, other=0.0)
            q, rounded = _rounded(value, s, z, qmax, levels, middles, n_middles, digits)
            chosen = tl.where(here, q[:, None], chosen)
            if has_free:
                keep = tl.load(free + row * free_stride + j, mask=inside_row, other=0)
                value = tl.where(keep != 0, value, rounded)
            else:
                value = rounded
        current = tl.where(here, value[:, None], current)
        factor = tl.load(gram + j * gram_stride + column, mask=inside_column & (column > j), other=0.0)
        c += (old - value)[:, None] * factor[None, :]
    after = target - current
    tl.store(residual + row[:, None] * residual_stride + column[None, :], after, mask=inside)
    tl.store(change + row[:, None] * n_columns + column[None, :], after - before, mask=inside)
    if rounding:
        tl.store(codes + row[:, None] * codes_stride + column[None, :], chosen.to(tl.uint8), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gptq(  # type: ignore[no-untyped-def]
    weight, target, feedback, scale, zero, group, levels, middles, codes, errors, outlier_above,  # noqa: ANN001
    n_rows, tiles, n_columns, n_groups, qmax, weight_stride, target_stride, codes_stride, errors_stride,  # noqa: ANN001
    feedback_stride, feedback_layer,  # noqa: ANN001
    has_outliers: tl.constexpr, one_group: tl.constexpr, n_middles: tl.constexpr, digits: tl.constexpr,
    rows_tile: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    layer = tl.program_id(0) // tiles
    inner = (tl.program_id(0) % tiles) * rows_tile + tl.arange(0, rows_tile)
    row, column = (layer * n_rows + inner).to(tl.int64), tl.arange(0, columns)
    feedback += layer.to(tl.int64) * feedback_layer
    inside_row, inside_column = inner < n_rows, column < n_columns
    inside = inside_row[:, None] & inside_column[None, :]
    w = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=inside, other=0.0)
    original = tl.load(target + row[:, None] * target_stride + column[None, :], mask=inside, other=0.0)
    chosen, off_by = tl.zeros_like(w), tl.zeros_like(w)
    s = tl.load(scale + row * n_groups, mask=inside_row, other=1.0)
    z = tl.load(zero + row * n_groups, mask=inside_row, other=0.0)
    for j in range(n_columns):
        here = column[None, :] == j
        kept = tl.sum(tl.where(here, w, 0.0), axis=1)
        if not one_group:
            g = tl.load(group + j)
            s = tl.load(scale + row * n_groups + g, mask=inside_row, other=1.0)
            z = tl.load(zero + row * n_groups + g, mask=inside_row, other=0.0)
        q, value = _rounded(kept, s, z, qmax, levels, middles, n_middles, digits)
        chosen = tl.where(here, q[:, None], chosen)
        if has_outliers:
            distance = kept - value
            value = tl.where(distance * distance > tl.load(outlier_above + j), kept, value)
        error = tl.sum(tl.where(here, original, 0.0), axis=1) - value
        off_by = tl.where(here, error[:, None], off_by)
        factor = tl.load(feedback + j * feedback_stride + column, mask=inside_column & (column > j), other=0.0)
        w += error[:, None] * factor[None, :]
    tl.store(weight + row[:, None] * weight_stride + column[None, :], w, mask=inside)
    tl.store(codes + row[:, None] * codes_stride + column[None, :], chosen.to(tl.uint8), mask=inside)
    tl.store(errors + row[:, None] * errors_stride + column[None, :], off_by, mask=inside)


def _trial(kernel: Kernels, device: torch.device, n_groups: int) -> list[Tensor]:
    """Codes of a block of random weights by coordinate descent, after a sweep that does not round, and by GPTQ.

    With more than one group, some entries are free and some are outliers, and the block is narrower than its tile.
    """
    grouped, n_rows = n_groups > 1, 2 * ROWS + 1
    n_columns = TRIAL_COLUMNS * 3 // 4 if grouped else TRIAL_COLUMNS
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, n_columns, generator=generator).to(device) for n in (n_rows, 2 * n_columns))
    gram = x.T @ x
    group = torch.arange(n_columns, device=device) * n_groups // n_columns
    scale, zero = (torch.full((n_rows, n_groups), v, device=device) for v in (0.3, 4.0))
    free, above = (weight > 2, torch.full((n_columns,), 0.2, device=device)) if grouped else (None, None)
    descended, rounded = (torch.zeros(weight.shape, dtype=torch.uint8, device=device) for _ in range(2))
    residual = 0.2 * weight
    block = ColumnBlock(
        weight, residual, residual @ gram, gram, scale, zero, group, NumberFormat(8), descended, False, free, above
    )
    kernel.coordinate_descent_(block)
    kernel.coordinate_descent_(block._replace(incoming=residual @ gram, rounding=True))
    feedback = (gram / gram.diagonal()[:, None]).triu()
    kernel.gptq_(block._replace(incoming=weight.clone(), matrix=feedback, codes=rounded))
    return [descended, rounded]


def _levels(block: ColumnBlock) -> tuple[Tensor, Tensor]:
    """Levels and middles; of evenly spaced ones any tensor: the kernel is told that it is not read."""
    table = block.numbers.table
    return (block.scale, block.scale) if table is None else level_tensors(table, block.scale.device, torch.float32)


def _sizes(block: ColumnBlock) -> dict[str, int]:
    middles = 0 if block.numbers.table is None else block.numbers.qmax
    return {"n_middles": middles, "digits": middles.bit_length()}


def _parts(n_columns: int) -> Iterator[tuple[slice, slice]]:
    """Columns that are visited at once, and those behind them."""
    for start in range(0, n_columns, PART_COLUMNS):
        end = min(start + PART_COLUMNS, n_columns)
        yield slice(start, end), slice(end, n_columns)


def _by_rows(matrix: Tensor) -> Tensor:
    """The matrix as it lies in a larger one, if its rows are side by side (a factorization may leave columns so)."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _of_layers(tensor: Tensor, dimensions: int) -> int:
    """How far the next layer's is, of a stack."""
    return tensor.stride(0) if tensor.dim() == dimensions else 0


class TritonKernels:
    """float32 tensors on a CUDA device. reach: C [out, in] is read and written by every product that updates it, which takes the
    longer the fewer columns it is of."""

    name, reach = "triton", 512

    def check(self, device: torch.device) -> TritonKernels:
        """Return self if both kernels compile as the solvers use them and agree with torch. Raises RuntimeError, or
        what a missing compiler or driver raises."""
        for n_groups in (1, 2):
            try:
                ours, reference = (_trial(kernel, device, n_groups) for kernel in (self, TorchKernels()))
            except triton.TritonError as error:
                raise RuntimeError(f"a kernel does not compile: {error}") from error
            for name, codes, expected in zip(("coordinate descent", "gptq"), ours, reference, strict=True):
                # A compiler may fuse a product and a sum, and a value on the edge of two codes then goes the other way.
                if (codes != expected).float().mean() > 0.01:
                    raise RuntimeError(f"the compiled kernel of {name} disagrees with torch")
        return self

    def coordinate_descent_(self, block: ColumnBlock) -> Tensor:
        """A program for a tile of rows; see `Kernels`. Blocks of more columns than registers hold are visited in parts."""
        n_columns = block.target.shape[1]
        if n_columns <= MOST_COLUMNS:
            return self._descend(block)
        asked, changes = block.incoming.clone(), []
        for part, later in _parts(n_columns):
            change = self._descend(block._replace(incoming=asked).part(part))
            changes.append(change)
            add_times_(asked[:, later], change, block.matrix[..., part, later])
        return torch.cat(changes, 1)

    def _descend(self, block: ColumnBlock) -> Tensor:
        target, residual, incoming = block.target, block.residual, block.incoming
        change, n_columns = torch.empty(target.shape, device=target.device), target.shape[1]
        layers = parts_of(block.matrix)
        n_rows = target.shape[0] // layers
        tiles = triton.cdiv(n_rows, ROWS)
        matrix, inverse = _by_rows(block.matrix), block.inverses()
        codes, free = (
            block.codes,
            target if block.free is None else block.free,
        )  # any tensor: has_free says it is not read
        _coordinate_descent[(layers * tiles,)](
            residual, incoming, target, matrix, inverse,
            block.scale, block.zero, block.group, *_levels(block), codes, free, change,
            n_rows, tiles, n_columns, block.scale.shape[1], float(block.numbers.qmax),
            residual.stride(0), incoming.stride(0), target.stride(0), codes.stride(0), free.stride(0),
            matrix.stride(-2), _of_layers(matrix, 3), _of_layers(inverse, 2),
            rounding=block.rounding, has_free=block.rounding and block.free is not None,
            one_group=block.scale.shape[1] == 1, **_sizes(block), rows_tile=ROWS,
            columns=triton.next_power_of_2(n_columns), enable_fp_fusion=FUSED,
        )  # fmt: skip
        return change

    def gptq_(self, block: ColumnBlock) -> None:
        """A program for a tile of rows; see `Kernels`. Wide blocks likewise in parts."""
        n_columns = block.target.shape[1]
        if n_columns <= MOST_COLUMNS:
            self._round(block)
            return
        for part, later in _parts(n_columns):
            self._round(block.part(part))
            add_times_(block.incoming[:, later], block.residual[:, part], block.matrix[..., part, later])

    def _round(self, block: ColumnBlock) -> None:
        target, residual, incoming, codes = block.target, block.residual, block.incoming, block.codes
        layers, n_columns = parts_of(block.matrix), target.shape[1]
        n_rows = target.shape[0] // layers
        tiles = triton.cdiv(n_rows, ROWS)
        matrix = _by_rows(block.matrix)
        _gptq[(layers * tiles,)](
            incoming, target, matrix, block.scale, block.zero, block.group, *_levels(block), codes, residual,
            target if block.outlier_above is None else block.outlier_above.contiguous(),
            n_rows, tiles, n_columns, block.scale.shape[1], float(block.numbers.qmax),
            incoming.stride(0), target.stride(0), codes.stride(0), residual.stride(0),
            matrix.stride(-2), _of_layers(matrix, 3),
            has_outliers=block.outlier_above is not None, one_group=block.scale.shape[1] == 1, **_sizes(block),
            rows_tile=ROWS, columns=triton.next_power_of_2(n_columns), enable_fp_fusion=FUSED,
        )  # fmt: skip

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """One dense product: finding the columns that changed would make the host wait for the device every block."""
        add_times_(correlation, change, gram)
