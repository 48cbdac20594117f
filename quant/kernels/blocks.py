"""One block of columns, column by column: the inner loop of coordinate descent and of GPTQ.

Everything here is transposed, columns of the layer first ([B, out]), so that a column is contiguous.
Rows of the layer are independent of each other. In-place functions end in an underscore.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_column(u: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Nearest codes (as floats) of one column u [out] on its grid."""
    return (u / scale).round_().add_(zero).clamp_(0, qmax)


def coordinate_descent_block_(
    residual: Tensor,
    correlation: Tensor,
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmax: int,
    codes: Tensor | None,
) -> None:
    """One pass of exact coordinate minimization over B columns (QuantEase, Alg. 2).

    residual [B, out]: W - Ŵ, updated. correlation [B, out]: the block's rows of Σ Eᵀ at the start; consumed.
    weight [B, out]: target. gram [B, B]. scale, zero [B, out] or [B, 1, out]-broadcastable rows. codes
    [B, out] uint8 receives the codes, or None for a relaxed pass, which stores the minimizer unrounded.
    Dead columns (zero Gram diagonal) round their current value.
    """
    diagonal = gram.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0).tolist()
    for j in range(weight.shape[0]):
        u = weight[j] - residual[j] + correlation[j] * inverse[j]
        if codes is None:
            new = weight[j] - u
        else:
            code = quantize_column(u, scale[j], zero[j], qmax)
            codes[j] = code
            new = weight[j] - (code - zero[j]) * scale[j]
        change = new - residual[j]
        residual[j] = new
        correlation[j + 1 :].addr_(gram[j, j + 1 :], change)


def gptq_block_(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, qmax: int, codes: Tensor, errors: Tensor
) -> None:
    """GPTQ's inner loop over B columns (GPTQ, Alg. 1).

    weight [B, out]: compensated weights, updated. upper [B, B]: the block of the inverse factor. scale,
    zero [B, out]. codes [B, out] uint8 and errors [B, out] receive the result.
    """
    diagonal = upper.diagonal().tolist()
    for j in range(weight.shape[0]):
        code = quantize_column(weight[j], scale[j], zero[j], qmax)
        codes[j] = code
        error = (weight[j] - (code - zero[j]) * scale[j]) / diagonal[j]
        errors[j] = error
        weight[j + 1 :].addr_(upper[j, j + 1 :], error, alpha=-1)
