"""One block of columns, column by column: the inner loops of coordinate descent and of GPTQ.

Rows of a layer are independent of each other; an implementation may treat them in any order and in parallel. Each
loop exists three times under one signature: plain torch (any device; the reference), numba (CPU: tiles of rows in
parallel, compiled code cached) and Triton (CUDA: a program for a tile of rows). In-place functions end in an underscore.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quant.core.rounding import NumberFormat
from quant.core.stacks import add_times_


class ColumnBlock(NamedTuple):
    """B columns of a layer that stand side by side in visiting order; a whole layer is one block of B = in columns.

    target float32 [out, B]: the weights W that Ŵ is to come close to.
    residual float32 [out, B]: W - Ŵ. Coordinate descent updates it, GPTQ writes it.
    incoming float32 [out, B]: what the columns outside the block ask of these. In coordinate descent the block's columns
    of (W - Ŵ) Σ at the start, read only. In GPTQ the target plus the feedback of earlier columns; updated.
    matrix float32 [B, B]: Σ between these columns. In GPTQ the feedback instead, unit upper triangular. Of a stack of
    layers (`quant.core.stacks`) [parts, B, B].
    scale, zero float32 [out, G]: of the whole layer; a zero may lie between two integers (a real minimum). group int64 [B]: the group of each column. numbers: what codes stand for.
    codes uint8 [out, B]: receives the codes. rounding: False for a relaxed pass of coordinate descent, which writes none.
    free bool [out, B]: entries that coordinate descent never rounds (outliers).
    inverse float32 [B], of a stack [parts, B]: `inverse_diagonal` of the matrix, where it is known.
    outlier_above float32 [B]: GPTQ keeps an entry as it is where (incoming - Q(incoming))² is larger (SpQR, Alg. 1).
    """

    target: Tensor
    residual: Tensor
    incoming: Tensor
    matrix: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    numbers: NumberFormat
    codes: Tensor
    rounding: bool = True
    free: Tensor | None = None
    outlier_above: Tensor | None = None
    inverse: Tensor | None = None

    def inverses(self) -> Tensor:
        """1 / diagonal of the matrix."""
        return inverse_diagonal(self.matrix) if self.inverse is None else self.inverse

    def part(self, columns: slice) -> ColumnBlock:
        """Some of the columns, as views: what is written to them is written to the whole."""
        return self._replace(
            target=self.target[:, columns],
            residual=self.residual[:, columns],
            incoming=self.incoming[:, columns],
            matrix=self.matrix[..., columns, columns],
            group=self.group[columns],
            codes=self.codes[:, columns],
            free=None if self.free is None else self.free[:, columns],
            outlier_above=None if self.outlier_above is None else self.outlier_above[columns],
            inverse=None if self.inverse is None else self.inverse[..., columns],
        )

    def layers(self) -> Iterator[ColumnBlock]:
        """The layers of a stack, as views."""
        rows = self.target.shape[0] // len(self.matrix)
        for number, matrix in enumerate(self.matrix):
            own = slice(number * rows, (number + 1) * rows)
            by_row = ("target", "residual", "incoming", "scale", "zero", "codes", "free")
            given = {name: value[own] for name in by_row if (value := getattr(self, name)) is not None}
            if self.inverse is not None:
                given["inverse"] = self.inverse[number]
            yield self._replace(matrix=matrix, **given)

    def nearest(self, u: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest codes (as floats) and values of u [out] for one column of the block."""
        g = int(self.group[column])
        scale, zero = self.scale[:, g], self.zero[:, g]
        if self.numbers.table is not None:
            code = self.numbers.codes(u, scale, zero)
            return code, self.numbers.steps(code, zero) * scale
        whole = zero.round()  # u is rounded beside what an integer zero lacks, which is nothing
        code = (u / scale).add_(zero - whole).round_().add_(whole).clamp_(0, self.numbers.qmax)
        return code, (code - zero) * scale


class Kernels(Protocol):
    """What a backend implements. reach: how many columns coordinate descent visits before those outside of them hear of it; 0 where
    they hear of every block."""

    name: str
    reach: int

    def coordinate_descent_(self, block: ColumnBlock) -> Tensor:
        """One pass of exact coordinate minimization over the columns (QuantEase, Alg. 2). Returns the change [out, B] of
        the residual. A dead column (zero on the Gram diagonal) rounds its current value."""

    def gptq_(self, block: ColumnBlock) -> None:
        """GPTQ's inner loop over the columns, in the form of QuIP's LDLQ (Chee et al., who show that the answer is the
        same): column k takes up residual_j · matrix_jk for every j < k in the block."""

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """correlation [out, in] += change [out, B] @ gram [B, in], of a stack of layers [parts, B, in]; changes may be mostly
        zero."""


class TorchKernels:
    """The reference: a loop over columns, vectorized over rows. instead: why it stands in for faster ones."""

    name, reach = "torch", 0

    def __init__(self, instead: str = "") -> None:
        self.instead = instead

    def coordinate_descent_(self, block: ColumnBlock) -> Tensor:
        """Every column is brought to its minimizer, and the later ones hear of it."""
        if block.matrix.dim() == 3:
            return torch.cat([self.coordinate_descent_(layer) for layer in block.layers()])
        target, residual, gram = block.target, block.residual, block.matrix
        inverse = block.inverses().tolist()
        correlation, before = block.incoming.clone(), residual.clone()
        for j in range(target.shape[1]):
            # The current value W - R, moved to where the derivative C_j - Σ_jj (u - Ŵ_j) is zero.
            u = target[:, j] - residual[:, j] + correlation[:, j] * inverse[j]
            new = u
            if block.rounding:
                code, new = block.nearest(u, j)
                block.codes[:, j] = code
                if block.free is not None:
                    new = torch.where(block.free[:, j], u, new)
            residual[:, j] = target[:, j] - new
            change = residual[:, j] - before[:, j]
            correlation[:, j + 1 :].addr_(change, gram[j, j + 1 :])
        return residual - before

    def gptq_(self, block: ColumnBlock) -> None:
        """Every column is rounded, and the later ones take up what that changed."""
        if block.matrix.dim() == 3:
            for layer in block.layers():
                self.gptq_(layer)
            return
        for j in range(block.target.shape[1]):
            asked = block.incoming[:, j]
            code, kept = block.nearest(asked, j)
            if block.outlier_above is not None:
                kept = torch.where((asked - kept).square() > block.outlier_above[j], asked, kept)
            block.codes[:, j], block.residual[:, j] = code, block.target[:, j] - kept
            block.incoming[:, j + 1 :].addr_(block.residual[:, j], block.matrix[j, j + 1 :])

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """One dense product."""
        add_times_(correlation, change, gram)


def inverse_diagonal(gram: Tensor) -> Tensor:
    """1 / diagonal, 0 where a column is dead."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal > 0, 1 / diagonal, 0.0)
