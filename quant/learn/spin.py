"""SpinQuant: the rotation of the residual stream, and those of values, learned for the whole quantized model's answer.

    min over orthogonal R, R_v of  mean over positions of KL(p(· | F(W)) ‖ p(· | F(Q(W; R, R_v))))

(Liu et al. 2024, arXiv 2405.16406, equation 2, with the divergence from full precision in the place of the cross-entropy; weights
are rounded to nearest inside, as they are where blocks learn; the paper leaves them in full precision in front of GPTQ.) An orthogonal
matrix stays one by the Cayley transform, R = R0 (I + S)⁻¹ (I - S) with S skew-symmetric, which Adam moves freely (the paper
takes gradient steps along Cayley's curves). R0 is the random Hadamard matrix of a rotation that is not learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.weights import BlockWeights
from quant.core.grid import range_to_grid
from quant.core.types import QuantSpec
from quant.learn.fake_quant import fake_quantize, group_range
from quant.learn.parametrization import Parameters
from quant.learn.rotation import Matrices, Rewriting

RATE = 5e-2  # of entries of S, over √n: S moves by about that in its largest singular value


def cayley(raw: Tensor) -> Tensor:
    """(I + S)⁻¹ (I - S), orthogonal, of S = U - Uᵀ with U [..., n, n] what stands above the diagonal of raw."""
    upper = raw.triu(1)
    skew = upper - upper.mT
    eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
    return torch.linalg.solve_ex(eye + skew, eye - skew).result  # I + S has no eigenvalue below 1 in size


@dataclass(frozen=True)
class Spin:
    """Rotations as functions of what is learned of them. start: matrices by name, float64."""

    start: Matrices

    def initial(self, device: torch.device) -> Parameters:
        """S = 0, float32, for every one."""
        return {name: torch.zeros(matrix.shape, device=device) for name, matrix in self.start.items()}

    def rates(self) -> dict[str, float]:
        """The rate of every parameter."""
        return {name: RATE / matrix.shape[-1] ** 0.5 for name, matrix in self.start.items()}

    def matrices(self, parameters: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Matrices:
        """The rotations in a dtype, in which they are computed; gradients pass."""
        return {
            name: start.to(parameters[name].device, dtype) @ cayley(parameters[name].to(dtype))
            for name, start in self.start.items()
        }

    @torch.no_grad()
    def learned(self, parameters: Mapping[str, Tensor]) -> Matrices:
        """The rotations, float64."""
        return {name: matrix.contiguous() for name, matrix in self.matrices(parameters, torch.float64).items()}


class TurnedLink:
    """A block of a chain, by the rotations of the model. weights: its parameters in full precision; spec: of the grid that
    linears are rounded to nearest on; None where they stay."""

    def __init__(
        self, model: LazyModel, index: int, weights: Weights, rewriting: Rewriting, spec: QuantSpec | None
    ) -> None:
        self.model, self.index, self.weights, self.rewriting, self.spec = model, index, weights, rewriting, spec

    def own(self, matrices: Mapping[str, Tensor]) -> Parameters:
        """All: the stream's is every block's."""
        return dict(matrices)

    def settled(self, matrices: Mapping[str, Tensor]) -> Parameters:
        """A copy of all."""
        return {name: matrix.detach().clone() for name, matrix in matrices.items()}

    def weights_at(self, matrices: Mapping[str, Tensor]) -> BlockWeights:
        """The rotated block, rounded, in the arithmetic's dtype; gradients pass."""
        parameters = self.rewriting.with_matrices(matrices).apply(self.weights, self.index)
        if self.spec is not None:
            linears = [f"{name}.weight" for group in self.model.groups for name in group]
            parameters |= {name: nearest(parameters[name], self.spec) for name in linears}
        tensors = {**parameters, **self.rewriting.online}
        return BlockWeights.from_named({name: t.to(self.model.dtype) for name, t in tensors.items()})


def nearest(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight [out, in] rounded to nearest on the grid over the whole range of its groups; gradients pass."""
    return fake_quantize(weight, *range_to_grid(*group_range(weight, spec), spec), spec.qmax)


def links_of(
    model: LazyModel, rewriting: Rewriting, spec: QuantSpec | None, device: torch.device
) -> Sequence[TurnedLink]:
    """Every block of a model."""
    return [
        TurnedLink(model, index, model.block_weights(index, device, torch.float32), rewriting, spec)
        for index in range(len(model.blocks))
    ]
