"""One block of columns, column by column: the inner loop of coordinate descent and of GPTQ.

Everything here is transposed, columns of the layer first ([B, out]), so that a column is contiguous. Rows of the
layer are independent of each other. Two implementations of one signature: plain torch (any device, the reference)
and numba (CPU, compiled, parallel over tiles of rows); `coordinate_descent_block_` and `gptq_block_` choose by
device. In-place functions end in an underscore.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_column(u: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Nearest codes (as floats) of one column u [out] on its grid."""
    return (u / scale).round_().add_(zero).clamp_(0, qmax)


def coordinate_descent_torch_(
    residual: Tensor,
    correlation: Tensor,
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    qmax: int,
    codes: Tensor | None,
) -> None:
    """One pass of exact coordinate minimization over B columns (QuantEase, Alg. 2).

    residual [B, out]: W - Ŵ, updated. correlation [B, out]: the block's rows of Σ Eᵀ at the start; consumed.
    weight [B, out]: target. gram [B, B]. scale, zero [G, out] and group [B], the group of each column.
    codes [B, out] uint8 receives the codes, or None for a relaxed pass, which stores the minimizer unrounded.
    Dead columns (zero Gram diagonal) round their current value.
    """
    inverse = inverse_diagonal(gram).tolist()
    for j, g in enumerate(group.tolist()):
        u = weight[j] - residual[j] + correlation[j] * inverse[j]
        if codes is None:
            new = weight[j] - u
        else:
            code = quantize_column(u, scale[g], zero[g], qmax)
            codes[j] = code
            new = weight[j] - (code - zero[g]) * scale[g]
        change = new - residual[j]
        residual[j] = new
        correlation[j + 1 :].addr_(gram[j, j + 1 :], change)


def gptq_torch_(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, qmax: int, codes: Tensor, errors: Tensor
) -> None:
    """GPTQ's inner loop over B columns (GPTQ, Alg. 1).

    weight [B, out]: compensated weights, updated. upper [B, B]: the block of the inverse factor. scale, zero
    [G, out] and group [B]. codes [B, out] uint8 and errors [B, out] receive the result.
    """
    diagonal = upper.diagonal().tolist()
    for j, g in enumerate(group.tolist()):
        code = quantize_column(weight[j], scale[g], zero[g], qmax)
        codes[j] = code
        error = (weight[j] - (code - zero[g]) * scale[g]) / diagonal[j]
        errors[j] = error
        weight[j + 1 :].addr_(upper[j, j + 1 :], error, alpha=-1)


def inverse_diagonal(gram: Tensor) -> Tensor:
    """1 / diagonal, 0 where a column is dead."""
    diagonal = gram.diagonal()
    return torch.where(diagonal > 0, 1 / diagonal, 0.0)


def coordinate_descent_block_(
    residual: Tensor,
    correlation: Tensor,
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    qmax: int,
    codes: Tensor | None,
) -> None:
    """`coordinate_descent_torch_`, by the fastest implementation for the tensors' device."""
    if weight.device.type == "cpu":
        from quant.kernels.cpu import coordinate_descent_cpu_ as implementation
    else:
        implementation = coordinate_descent_torch_
    implementation(residual, correlation, weight, gram, scale, zero, group, qmax, codes)


def gptq_block_(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, qmax: int, codes: Tensor, errors: Tensor
) -> None:
    """`gptq_torch_`, by the fastest implementation for the tensors' device."""
    if weight.device.type == "cpu":
        from quant.kernels.cpu import gptq_cpu_ as implementation
    else:
        implementation = gptq_torch_
    implementation(weight, upper, scale, zero, group, qmax, codes, errors)
