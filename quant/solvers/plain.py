"""GPTQ and coordinate descent as their papers write them: float64, a column at a time, nothing carried over.

To be read beside `gptq` and `quantease`, and the truth in their tests. Nothing here is shared with them, not even the
rounding. Slow: GPTQ takes out·in² + in⁴ operations, a sweep of the descent out·in².
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Fit = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # weights [out, n], their first column -> scale and zero [out]


def plain_gptq(
    weight: Tensor, gram: Tensor, percdamp: float, n_levels: int, size: int, fit: Fit
) -> tuple[Tensor, Tensor]:
    """Codes and values [out, in] of GPTQ (Frantar et al. 2023) for weight [out, in], left to right.

    fit: the grid of ``size`` columns, asked for when the first of them is reached, with their weights as they are then.
    """
    w, h = weight.double().clone(), gram.double().clone()
    n_in = w.shape[1]
    dead = h.diagonal() == 0
    h += percdamp * h.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)  # section 3.3, step 3
    h[dead, dead] = 1.0
    codes, values = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(n_in):
        if j % size == 0:
            scale, zero = fit(w[:, j : j + size], j)
        codes[:, j] = torch.clamp(torch.round(w[:, j] / scale) + zero, 0, n_levels - 1)
        values[:, j] = scale * (codes[:, j] - zero)
        # Equation 2, F being the columns from j on: δ_F = -(w_j - quant(w_j)) / [H_F⁻¹]_jj · (H_F⁻¹)_j
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - values[:, j]) / inverse[0, 0], inverse[0])
    return codes, values


def plain_descent(
    weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, n_levels: int, rounding: list[bool]
) -> tuple[Tensor, Tensor]:
    """Codes and values [out, in] of QuantEase (Behdin et al. 2023, Algorithm 1) for weight [out, in], from the weight on.

    scale, zero [out, in]: the grid of every entry. rounding: of every sweep, whether it rounds or keeps the minimizers.
    """
    w, sigma = weight.double(), gram.double()
    codes, values = torch.zeros_like(w), w.clone()
    for is_rounding in rounding:
        for j in range(w.shape[1]):
            # Where d/du ‖(W - Ŵ)X‖² = 0 for Ŵ_j = u:  u Σ_jj = Σ_k W_k Σ_kj - Σ_{k≠j} Ŵ_k Σ_kj
            others = values @ sigma[:, j] - values[:, j] * sigma[j, j]
            u = (w @ sigma[:, j] - others) / sigma[j, j] if sigma[j, j] > 0 else values[:, j]
            if is_rounding:
                codes[:, j] = torch.clamp(torch.round(u / scale[:, j]) + zero[:, j], 0, n_levels - 1)
                u = scale[:, j] * (codes[:, j] - zero[:, j])
            values[:, j] = u
    return codes, values
