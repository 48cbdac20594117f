"""Several layers of one shape at once, as the experts of a mixture are: their rows one below the other in equal parts, and of
every part a Gram matrix of its own.

What is a product with one matrix [n, k] for a layer is a batch of products with [parts, n, k] for a stack; everything else that
a solver does is done row by row and does not know of parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.core.gram import GramStats


class StackedStats:
    """Statistics of the layers of a stack; the part of `GramStats` that solvers ask for.

    gram float32 [parts, in, in]. importance float32 [parts · rows, in]: of every row its layer's Gram diagonal.
    """

    cross: Tensor | None = None
    residual: Tensor | None = None

    def __init__(self, layers: Sequence[GramStats], rows: int) -> None:
        self.layers = layers
        self.gram = torch.stack([layer.gram for layer in layers])
        self.importance = self.diagonal.repeat_interleave(rows, 0)

    @property
    def diagonal(self) -> Tensor:
        """Of every layer, [parts, in]."""
        return self.gram.diagonal(dim1=-2, dim2=-1)

    def check(self, name: str = "a layer") -> StackedStats:
        """As `GramStats.check`."""
        for layer in self.layers:
            layer.check(name)
        return self


def parts_of(matrix: Tensor) -> int:
    """How many layers a matrix is of."""
    return matrix.shape[0] if matrix.dim() == 3 else 1


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [R, n] times a matrix [n, k], or every part of them times its own of [parts, n, k]."""
    if matrix.dim() == 2:
        return rows @ matrix
    return (rows.unflatten(0, (matrix.shape[0], -1)) @ matrix).flatten(0, 1)


def add_times_(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """total [R, k] += `times`."""
    if matrix.dim() == 2:
        total.addmm_(rows, matrix)
    else:
        parts = (matrix.shape[0], -1)
        total.unflatten(0, parts).baddbmm_(rows.unflatten(0, parts), matrix)


def for_rows(values: Tensor, rows: int) -> Tensor:
    """A number of every layer [parts] for all of its rows; one number [] as it is."""
    return values if values.dim() == 0 else values.repeat_interleave(rows // len(values))
