"""The block loops in Triton: a program for a tile of rows; its slice of the block stays in registers.

A column is picked out of the register tile by a masked sum, which costs as many operations as the rank-one update
that follows. The rows of the B x B matrix come from L1. B must be a power of two here; shorter blocks are padded
by masks. Without a GPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1), as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.blocks import ColumnGrid, TorchKernels, inverse_diagonal

ROWS = 16


@triton.jit
def _round_half_even(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Nearest integer of |x| < 2^22, ties to even, as torch rounds (adding 1.5·2^23 leaves no fraction bits)."""
    shifted = x + 12582912.0
    return shifted - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def _coordinate_descent(  # type: ignore[no-untyped-def]
    residual, correlation, weight, gram, inverse, scale, zero, group, codes, free, change,  # noqa: ANN001
    n_rows, n_columns, n_groups, qmax,  # noqa: ANN001
    residual_stride, correlation_stride, weight_stride, gram_stride, codes_stride, free_stride,  # noqa: ANN001
    rounding: tl.constexpr, has_free: tl.constexpr, rows_tile: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    row = tl.program_id(0) * rows_tile + tl.arange(0, rows_tile)
    column = tl.arange(0, columns)
    inside_row, inside_column = row < n_rows, column < n_columns
    tile = correlation + row[:, None] * correlation_stride + column[None, :]
    c = tl.load(tile, mask=inside_row[:, None] & inside_column[None, :], other=0.0)
    for j in range(n_columns):
        current = tl.load(residual + row * residual_stride + j, mask=inside_row, other=0.0)
        target = tl.load(weight + row * weight_stride + j, mask=inside_row, other=0.0)
        own = tl.sum(tl.where(column[None, :] == j, c, 0.0), axis=1)
        value = target - current + own * tl.load(inverse + j)
        if rounding:
            g = tl.load(group + j)
            s = tl.load(scale + row * n_groups + g, mask=inside_row, other=1.0)
            z = tl.load(zero + row * n_groups + g, mask=inside_row, other=0.0)
            q = tl.math.div_rn(value, s)
            # Far outside the grid the exact integer does not matter, only that the sum stays in range.
            q = _round_half_even(tl.minimum(tl.maximum(q, -4096.0), 4096.0)) + z
            q = tl.minimum(tl.maximum(q, 0.0), qmax)
            tl.store(codes + row * codes_stride + j, q.to(tl.uint8), mask=inside_row)
            rounded = (q - z) * s
            if has_free:
                keep = tl.load(free + row * free_stride + j, mask=inside_row, other=0)
                value = tl.where(keep != 0, value, rounded)
            else:
                value = rounded
        new = target - value
        step = new - current
        tl.store(residual + row * residual_stride + j, new, mask=inside_row)
        tl.store(change + row * n_columns + j, step, mask=inside_row)
        later = inside_column & (column > j)
        factor = tl.load(gram + j * gram_stride + column, mask=later, other=0.0)
        c += step[:, None] * factor[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _gptq(  # type: ignore[no-untyped-def]
    weight, target, feedback, scale, zero, group, codes, errors, outlier_above,  # noqa: ANN001
    n_rows, n_columns, n_groups, qmax, weight_stride, target_stride, codes_stride, errors_stride,  # noqa: ANN001
    has_outliers: tl.constexpr, rows_tile: tl.constexpr, columns: tl.constexpr,
):  # noqa: ANN202  # fmt: skip
    row = tl.program_id(0) * rows_tile + tl.arange(0, rows_tile)
    column = tl.arange(0, columns)
    inside_row, inside_column = row < n_rows, column < n_columns
    inside = inside_row[:, None] & inside_column[None, :]
    tile = weight + row[:, None] * weight_stride + column[None, :]
    w = tl.load(tile, mask=inside, other=0.0)
    for j in range(n_columns):
        kept = tl.sum(tl.where(column[None, :] == j, w, 0.0), axis=1)
        g = tl.load(group + j)
        s = tl.load(scale + row * n_groups + g, mask=inside_row, other=1.0)
        z = tl.load(zero + row * n_groups + g, mask=inside_row, other=0.0)
        q = tl.math.div_rn(kept, s)
        q = _round_half_even(tl.minimum(tl.maximum(q, -4096.0), 4096.0)) + z
        q = tl.minimum(tl.maximum(q, 0.0), qmax)
        value = (q - z) * s
        if has_outliers:
            off = kept - value
            value = tl.where(off * off > tl.load(outlier_above + j), kept, value)
        error = tl.load(target + row * target_stride + j, mask=inside_row, other=0.0) - value
        tl.store(codes + row * codes_stride + j, q.to(tl.uint8), mask=inside_row)
        tl.store(errors + row * errors_stride + j, error, mask=inside_row)
        factor = tl.load(feedback + j * n_columns + column, mask=inside_column & (column > j), other=0.0)
        w += error[:, None] * factor[None, :]
    tl.store(tile, w, mask=inside)


class TritonKernels:
    """float32 tensors on a CUDA device. Arguments as in `blocks.Kernels`."""

    name = "triton"

    def check(self, device: torch.device) -> TritonKernels:
        """Return self if a small block compiles and agrees with torch. Raises RuntimeError, or what a missing
        compiler or driver raises."""
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, 8, generator=generator).to(device) for n in (32, 4))
        grid = ColumnGrid(
            torch.full((4, 1), 0.3, device=device), torch.full((4, 1), 4.0, device=device),
            torch.zeros(8, dtype=torch.int64, device=device), 7,
        )  # fmt: skip
        found = []
        for kernel in (self, TorchKernels()):
            codes = torch.zeros(4, 8, dtype=torch.uint8, device=device)
            state = torch.zeros_like(weight)
            try:
                kernel.coordinate_descent_(state, torch.zeros_like(weight), weight, x.T @ x, grid, codes)
            except triton.TritonError as error:
                raise RuntimeError(f"the kernel does not compile: {error}") from error
            found.append(codes)
        if not torch.equal(*found):
            raise RuntimeError("the compiled kernel disagrees with torch")
        return self

    def coordinate_descent_(
        self,
        residual: Tensor,
        correlation: Tensor,
        weight: Tensor,
        gram: Tensor,
        grid: ColumnGrid,
        codes: Tensor | None,
        free: Tensor | None = None,
    ) -> Tensor:
        """See `Kernels`."""
        n_rows, n_columns = weight.shape
        change = torch.empty(n_rows, n_columns, device=weight.device)
        stored, flags = weight if codes is None else codes, weight if free is None else free
        _coordinate_descent[(triton.cdiv(n_rows, ROWS),)](
            residual, correlation, weight, gram.contiguous(), inverse_diagonal(gram), grid.scale, grid.zero, grid.group,
            stored, flags, change,
            n_rows, n_columns, grid.scale.shape[1], float(grid.qmax),
            residual.stride(0), correlation.stride(0), weight.stride(0), n_columns, stored.stride(0),
            flags.stride(0),
            rounding=codes is not None, has_free=codes is not None and free is not None,
            rows_tile=ROWS, columns=triton.next_power_of_2(n_columns),
        )  # fmt: skip
        return change

    def gptq_(
        self,
        weight: Tensor,
        target: Tensor,
        feedback: Tensor,
        grid: ColumnGrid,
        codes: Tensor,
        errors: Tensor,
        outlier_above: Tensor | None = None,
    ) -> None:
        """See `Kernels`."""
        n_rows, n_columns = weight.shape
        _gptq[(triton.cdiv(n_rows, ROWS),)](
            weight, target, feedback.contiguous(), grid.scale, grid.zero, grid.group, codes, errors,
            weight if outlier_above is None else outlier_above.contiguous(),
            n_rows, n_columns, grid.scale.shape[1], float(grid.qmax),
            weight.stride(0), target.stride(0), codes.stride(0), errors.stride(0),
            has_outliers=outlier_above is not None, rows_tile=ROWS, columns=triton.next_power_of_2(n_columns),
        )  # fmt: skip

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """A matrix product over the columns where something changed."""
        correlation.addmm_(change, gram)
