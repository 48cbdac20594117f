"""What a linear is solved for where its inputs are not those of the original model: the corrected target.

Everything before a linear is quantized already, so it reads X̂ where the original reads X. What it should write is what the
original writes, and besides, for linears that add to the residual stream, what that stream R̂ lacks of the original R:

    L(Ŵ) = ‖ŴX̂ - (WX + ρ(R - R̂))‖² = tr(ŴĤŴᵀ) - 2 tr(ŴCᵀ) + const,    Ĥ = X̂X̂ᵀ,  C = W·XX̂ᵀ + ρ(R - R̂)X̂ᵀ

which is ‖(T - Ŵ)X̂‖² and a constant with T = CĤ⁻¹: every solver minimizes it that is given T for W. Damping both sides,
Ĥ + λI and C + λW, keeps T at W where nothing was seen: T = W + (C - WĤ)(Ĥ + λI)⁻¹. For coordinate descent that is the same
as u_j = Ŵ_j + (C_j - (ŴĤ)_j) / Ĥ_jj. (The quadratic is that of GPTAQ, arXiv 2504.02692, and Qronos, 2505.11695; the
strength is QEP's, 2504.09629; the residual's error WaterSIC's, 2603.04956.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.linalg import SingularGramError
from quant.core.scaling import exponent_outside

DAMPING = 0.01  # of the mean of the Gram diagonal, on both sides


@dataclass(frozen=True)
class Correction:
    """How far the target is moved from the weight itself. strength: from 0 (W) to 1 (all of what T says). residual: ρ, of
    the linears that add to the residual stream, 0 or 1. damping: λ, times the mean of the Gram diagonal."""

    strength: float = 1.0
    residual: float = 0.0
    damping: float = DAMPING


def corrected(weight: Tensor, stats: GramStats, correction: Correction) -> tuple[Tensor, GramStats]:
    """T for weight float32 [out, in], and the statistics with Ĥ + λI to solve for it with.

    Raises ValueError where the statistics hold no cross term, SingularGramError where the damped Ĥ is singular.
    """
    if stats.cross is None:
        raise ValueError("the statistics hold no cross term with the original model's inputs: nothing to correct with")
    k = exponent_outside(weight)
    weight = weight if k == 0 else weight * 2.0**-k  # products of weights that large or small leave the dtype
    damped = stats.gram.clone()
    damped.diagonal().add_(correction.damping * damped.diagonal().mean())
    lacking = weight @ (stats.cross - stats.gram)
    if correction.residual and stats.residual is not None:
        lacking += correction.residual * 2.0**-k * stats.residual
    target = weight + correction.strength * divided(lacking, damped)
    return (target if k == 0 else target * 2.0**k), GramStats.from_gram(damped, stats.n_tokens, stats.rank)


def divided(matrix: Tensor, gram: Tensor) -> Tensor:
    """matrix [out, in] · gram⁻¹ for a symmetric positive definite gram [in, in]; of columns of zeros of the Gram matrix, which
    no input reaches, zeros. In the dtype of its arguments. Raises SingularGramError."""
    dead = gram.diagonal() == 0
    lower, info = torch.linalg.cholesky_ex(gram + torch.diag(dead.to(gram.dtype)))
    if int(info) != 0:
        raise SingularGramError(
            "the damped Gram matrix is singular: the corrected target needs more calibration samples"
        )
    return torch.cholesky_solve(matrix.T, lower).T.masked_fill(dead, 0)
