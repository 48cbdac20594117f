"""AffineQuant: affine matrices instead of scales, kept invertible by a mask that opens from the diagonal.

    min over A, δ of ‖f(X, W) - f((X - δ) A⁻¹, Q(A W), b + δ W)‖²        (Ma et al., ICLR 2024, equation 4)

``--use_ln_matrix``: a matrix behind every norm, which no norm can hold; it stays as one product in the model and its
cost is reported. ``--use_matrix``: matrices for each head between queries and keys and between values and the output
projection, which cost nothing. Matrices start as OmniQuant's scales. In epoch e of t the entries within
int((n - 1) e / (t - 1)) + 1 of the diagonal are free, times the stability factor; a step that would cost a row its
strict diagonal dominance is taken back for that row (`quant.learn.learner`).
"""

from __future__ import annotations

from quant.learn import recipe
from quant.learn.config import Learning
from quant.learn.omniquant import omniquant


@recipe("affinequant")
def affinequant(asked: Learning, wbits: int, abits: int) -> Learning:
    """OmniQuant's row; the matrices are what ``--use_matrix`` and ``--use_ln_matrix`` asked for."""
    return omniquant(asked, wbits, abits)
