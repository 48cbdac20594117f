"""AffineQuant: affine matrices instead of scales, kept invertible by a mask that opens from the diagonal.

    min over A, δ of ‖f(X, W) - f((X - δ) A⁻¹, Q(A W), b + δ W)‖²        (Ma et al., ICLR 2024, equation 4)

``--use_ln_matrix``: a matrix behind every norm, which no norm can hold; it stays as one product in the model and its
cost is reported. ``--use_matrix``: matrices for each head between queries and keys and between values and the output
projection, which cost nothing. Matrices start as OmniQuant's scales. In epoch e of t the entries within
int((n - 1) e / (t - 1)) + 1 of the diagonal are free, times the stability factor; a step that would cost a row its
strict diagonal dominance is taken back for that row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.family import HeadLayout, Seam
from quant.learn import recipe, transform
from quant.learn.config import Learning, TransformSpec
from quant.learn.omniquant import omniquant
from quant.learn.parametrization import Parameters
from quant.learn.transforms import HEAD_KINDS, SMALLEST_SCALE, StraightThrough, Transform, commutes_with_rope


@recipe("affinequant")
def affinequant(learning: Learning, wbits: int, abits: int) -> Learning:
    """OmniQuant's row; the matrices are what ``--use_matrix`` and ``--use_ln_matrix`` asked for."""
    return omniquant(learning, wbits, abits)


def takes_matrix(seam: Seam, spec: TransformSpec) -> bool:
    """Whether a matrix is asked for at the seam: behind a norm, or one for each head."""
    return (spec.norm_matrix and seam.kind == "norm") or (spec.matrix and seam.kind in HEAD_KINDS)


@transform("matrix")
class GradualMatrix(Transform):
    """M [heads, d, d] under the gradual mask, every row strictly diagonally dominant."""

    guarded = ("matrix",)
    rejected: Tensor | int = 0  # rows whose step was taken back; counted on the device, read when the block is done

    @staticmethod
    def stands_at(seam: Seam, layout: HeadLayout, spec: TransformSpec) -> bool:
        """Wherever a matrix is asked for that need not commute with rotary embeddings."""
        return takes_matrix(seam, spec) and not commutes_with_rope(seam, layout, spec)

    def start(self, scale: Tensor) -> Parameters:
        """The scale on the diagonal."""
        return {"matrix": torch.diag_embed(scale)}

    def effective(self, parameters: Parameters, progress: float) -> Parameters:
        """With the mask in the matrix."""
        matrix = parameters["matrix"]
        mask = gradual_mask(matrix.shape[-1], progress, self.spec.stability, matrix)
        return {**parameters, "matrix": matrix * mask}

    def raw(self, effective: Parameters) -> Parameters:
        """Without the factor that the open mask has off the diagonal."""
        matrix = effective["matrix"]
        diagonal = torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
        return {**effective, "matrix": diagonal + (matrix - diagonal) / self.spec.stability}

    def inverse(self, parameters: Parameters) -> Tensor:
        """The masked matrix."""
        return parameters["matrix"]

    def after_step(self, parameters: Parameters, before: Parameters, progress: float) -> None:
        """Take back the step of every row that would lose strict diagonal dominance."""
        matrix = parameters["matrix"]
        holds = (dominance(self.effective(parameters, progress)["matrix"]) > 0).unsqueeze(-1)  # [heads, n, 1]
        matrix.copy_(torch.where(holds, matrix, before["matrix"]))
        self.rejected = self.rejected + (~holds).sum()

    def facts(self, parameters: Parameters) -> Mapping[str, Any]:
        """How far the matrix is from being singular, and how many rows' steps were taken back for it."""
        margin = float(dominance(parameters["matrix"]).min())
        return {"smallest_dominance": margin, "rejected_rows": int(self.rejected)}


def gradual_mask(n: int, progress: float, stability: float, like: Tensor) -> Tensor:
    """The mask [n, n]: 1 on the diagonal, ``stability`` on a band around it that opens with progress.

    The band reaches int((n - 1) · progress) + 1 off the diagonal, so one epoch alone sees it open.
    """
    position = torch.arange(n, device=like.device)
    distance = (position[:, None] - position).abs()
    band = (distance <= int((n - 1) * progress) + 1).to(like.dtype) * stability
    return torch.where(distance == 0, 1.0, band)


def dominance(matrix: Tensor) -> Tensor:
    """How far every row of matrices [heads, n, n] is from losing strict diagonal dominance: 1 - Σ|off| / |diagonal|.

    Positive rows everywhere make the matrix invertible (Levy-Desplanques; section 3.3 of the paper).
    """
    size = matrix.abs()
    diagonal = size.diagonal(dim1=-2, dim2=-1)
    return 2 - size.sum(-1) / diagonal.clamp_min(torch.finfo(matrix.dtype).tiny)


@transform("rope matrix")
class RopeMatrix(Transform):
    """M between queries and keys that are rotated: one complex factor a + bi, ``real`` and ``imaginary`` [heads, d / 2],
    for each pair (i, i + d/2). (The released code's matrices do not commute with the rotation.)"""

    @staticmethod
    def stands_at(seam: Seam, layout: HeadLayout, spec: TransformSpec) -> bool:
        """Wherever a matrix is asked for that must commute with rotary embeddings."""
        return takes_matrix(seam, spec) and commutes_with_rope(seam, layout, spec)

    def start(self, scale: Tensor) -> Parameters:
        """Real factors."""
        half = scale[:, : scale.shape[1] // 2]
        return {"real": half, "imaginary": torch.zeros_like(half)}

    def inverse(self, parameters: Parameters) -> Tensor:
        """The factors as matrices, none of them near 0."""
        return pair_matrix(*floored_factors(parameters["real"], parameters["imaginary"]))

    def facts(self, parameters: Parameters) -> Mapping[str, Any]:
        """How far the factors are from 0."""
        factors = floored_factors(parameters["real"], parameters["imaginary"])
        return {"smallest_factor": float(factors.norm(dim=0).min())}


def pair_matrix(real: Tensor, imaginary: Tensor) -> Tensor:
    """Matrices [heads, d, d] that act on the pairs (i, i + d/2) as complex factors [heads, d / 2]."""
    a, b = torch.diag_embed(real), torch.diag_embed(imaginary)
    return torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)


def floored_factors(real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex factors [heads, d / 2] as [2, heads, d / 2], lengthened to SMALLEST_SCALE where |a + bi| is below it, which
    0 becomes; the gradient passes."""
    factors = torch.stack([real, imaginary])
    with torch.no_grad():
        size = torch.hypot(real, imaginary)
        floored = factors * (SMALLEST_SCALE / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(min=1)
        floored[0] = torch.where(size == 0, SMALLEST_SCALE, floored[0])
    return StraightThrough.apply(factors, floored)
