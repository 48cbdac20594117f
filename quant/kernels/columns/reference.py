"""One block of columns, column by column: the inner loops of coordinate descent and of GPTQ.

Rows of a layer are independent of each other; an implementation may treat them in any order and in parallel. Each
loop exists three times under one signature: plain torch (any device; the reference), numba (CPU: tiles of rows in
parallel, compiled code cached) and Triton (CUDA: a program for a tile of rows). In-place functions end in an underscore.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ColumnGrid(NamedTuple):
    """The grid of a block of B columns: scale and zero float32 [out, G] of the whole layer, group int64 [B], qmax."""

    scale: Tensor
    zero: Tensor
    group: Tensor
    qmax: int

    def nearest(self, u: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest codes (as floats) and values of u [out] for one column of the block."""
        g = int(self.group[column])
        scale, zero = self.scale[:, g], self.zero[:, g]
        code = (u / scale).round_().add_(zero).clamp_(0, self.qmax)
        return code, (code - zero) * scale


class Kernels(Protocol):
    """What a backend implements."""

    name: str

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
        """One pass of exact coordinate minimization over B columns (QuantEase, Alg. 2). Returns the change [out, B].

        residual [out, B]: W - Ŵ, updated. correlation [out, B]: the block's columns of (W - Ŵ) Σ at the start; not
        changed. weight [out, B]: target. gram [B, B]. codes [out, B] uint8 receives the codes, or None for a relaxed
        pass, which stores the minimizer unrounded. free [out, B] bool: entries that are never rounded (outliers).
        Dead columns (zero Gram diagonal) round their current value.
        """

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
        """GPTQ's inner loop over B columns, in the form of QuIP's LDLQ (Chee et al., who show that the answer is the same).

        weight [out, B]: target plus the feedback of earlier columns; updated. target [out, B]: the original weights.
        feedback [B, B]: unit upper triangular; column k takes up errors_j · feedback_jk for every j < k. codes uint8
        and errors = target - what is kept, float32, both [out, B], receive the result. outlier_above float32 [B]: an
        entry is kept as it is (in ``weight``) where (weight - Q(weight))² is larger (SpQR, Alg. 1).
        """

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """correlation [out, in] += change [out, B] @ gram [B, in]; changes may be mostly zero."""


class TorchKernels:
    """The reference: a loop over columns, vectorized over rows. instead: why it stands in for faster ones."""

    name = "torch"

    def __init__(self, instead: str = "") -> None:
        self.instead = instead

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
        inverse = inverse_diagonal(gram).tolist()
        correlation, before = correlation.clone(), residual.clone()
        for j in range(weight.shape[1]):
            u = weight[:, j] - residual[:, j] + correlation[:, j] * inverse[j]
            new = u
            if codes is not None:
                code, new = grid.nearest(u, j)
                codes[:, j] = code
                if free is not None:
                    new = torch.where(free[:, j], u, new)
            residual[:, j] = weight[:, j] - new
            change = residual[:, j] - before[:, j]
            correlation[:, j + 1 :].addr_(change, gram[j, j + 1 :])
        return residual - before

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
        for j in range(weight.shape[1]):
            code, kept = grid.nearest(weight[:, j], j)
            if outlier_above is not None:
                kept = torch.where((weight[:, j] - kept).square() > outlier_above[j], weight[:, j], kept)
            codes[:, j], errors[:, j] = code, target[:, j] - kept
            weight[:, j + 1 :].addr_(errors[:, j], feedback[j, j + 1 :])

    def propagate_(self, correlation: Tensor, change: Tensor, gram: Tensor) -> None:
        """See `Kernels`."""
        correlation.addmm_(change, gram)


def inverse_diagonal(gram: Tensor) -> Tensor:
    """1 / diagonal, 0 where a column is dead."""
    diagonal = gram.diagonal()
    return torch.where(diagonal > 0, 1 / diagonal, 0.0)
