"""Rewriting weights at a seam: x' = (x - shift) A, written by the producers, undone by the consumers.

One sign convention: consumers W' = W A⁻ᵀ, b' = b + W shift; producers V' = Aᵀ V, c' = Aᵀ (c - shift); norms hold a
diagonal A and the shift only. Everything is out of place and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from models.family import HeadLayout, ResidualStream, Seam, places
from models.load import Weights
from quant.blocks.online import AND, kronecker
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError


@dataclass(frozen=True)
class Affine:
    """A by its inverse M, for each head: the diagonal's entries [heads, d], or dense [heads, d, d]. shift [heads, d].

    Seams without heads have one. ``float64`` inverts dense matrices in that dtype; orthogonal ones are not inverted at all.
    """

    inverse: Tensor
    shift: Tensor | None = None
    float64: bool = False
    orthogonal: bool = False

    @property
    def dense(self) -> bool:
        """Whether M holds more than a diagonal."""
        return self.inverse.dim() == 3

    def matrix(self) -> Tensor:
        """A of a dense transform, [heads, d, d]."""
        if self.orthogonal:
            return self.inverse.mT
        inverse = self.inverse.double() if self.float64 else self.inverse
        # `inv` would wait for the device to say whether it is singular; numbers that are not finite are seen later
        return torch.linalg.inv_ex(inverse).inverse.to(self.inverse.dtype)

    def forward_rows(self, rows: Tensor) -> Tensor:
        """Aᵀ V for rows [heads, repeats, d, in]."""
        if not self.dense:
            return rows / self.inverse[:, None, :, None]
        return torch.einsum("hde,hrdi->hrei", self.matrix(), rows)

    def inverse_rows(self, rows: Tensor) -> Tensor:
        """M V for rows [heads, repeats, d, in]."""
        if not self.dense:
            return rows * self.inverse[:, None, :, None]
        return torch.einsum("hde,hrei->hrdi", self.inverse, rows)

    def columns(self, weight: Tensor) -> Tensor:
        """W A⁻ᵀ for columns [out, heads, repeats, d]."""
        if not self.dense:
            return weight * self.inverse[:, None]
        return torch.einsum("ohrd,hed->ohre", weight, self.inverse)


def apply_seam(
    weights: BlockWeights, seam: Seam, layout: HeadLayout, affine: Affine, norm_offset: float = 0.0
) -> BlockWeights:
    """The block's weights with the transform in them; entries that stay are the same tensors."""
    new = weights.with_parameters(rewrite(weights.parameters, seam, layout, affine, norm_offset))
    if seam.kind != "norm" or not affine.dense:
        return new
    # No norm holds it: it goes behind, as a matrix of its own
    matrices = dict.fromkeys(places(seam.producers, outside=False), affine.matrix()[0])
    return replace(new, online={**new.online, **matrices})


def apply_online(
    weights: BlockWeights, readers: tuple[str, ...], left: Tensor | None, right: Tensor | None
) -> BlockWeights:
    """A block with x' = x (left ⊗ right) in front of all linears that read x, which take it back: W' = W (left ⊗ right)⁻ᵀ.

    left [p1, p1], right [p2, p2], either may be missing; inverted in float64, not finite where they are singular. Raises InputError where one stands there.
    """

    def undoing(matrix: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        # `inv` would wait for the device to say whether it is singular; numbers that are not finite are seen later
        return None if matrix is None else torch.linalg.inv_ex(matrix.double()).inverse.mT.to(dtype)

    new = {}
    for linear in readers:
        name, weight = f"{linear}.weight", weights.weight(linear)
        new[name] = kronecker(weight, undoing(left, weight.dtype), undoing(right, weight.dtype))
    key = AND.join(readers)
    if key in weights.lefts or key in weights.rights:
        raise InputError(f"a matrix stands in front of {key} already, as --rotate down puts it: leave one of them out")
    lefts = weights.lefts if left is None else {**weights.lefts, key: left}
    rights = weights.rights if right is None else {**weights.rights, key: right}
    return replace(weights.with_parameters(new), lefts=lefts, rights=rights)


def rewrite(
    weights: Weights, seam: Seam, layout: HeadLayout, affine: Affine, norm_offset: float = 0.0, outside: bool = False
) -> Weights:
    """Parameters of a block with the transform in them, or those outside the blocks; entries that stay are the same tensors.
    Norms keep their weights under a dense A, which is no parameter of theirs."""
    heads = affine.inverse.shape[0]
    if seam.kind == "qk":  # the product of queries and keys undoes it: there is no consumer
        queries = _producer(weights, *layout.q, heads, affine.forward_rows)
        return _producer(queries, *layout.k, heads, affine.inverse_rows)
    new = dict(weights)
    for linear in places(seam.consumers, outside):
        new |= _consumer(weights, linear, affine, layout.repeats if seam.kind == "vo" else 1)
    for producer in places(seam.producers, outside):
        if seam.kind == "norm":
            new |= _norm(weights, producer, affine, norm_offset)
        elif outside:  # an embedding: its rows are values of the seam, x' = x A
            new[f"{producer}.weight"] = weights[f"{producer}.weight"] @ affine.matrix()[0]
        else:
            name, rows = layout.v if seam.kind == "vo" else (producer, _rows_of(weights, producer, seam))
            if affine.shift is not None:
                bias = new[f"{name}.bias"]
                new[f"{name}.bias"] = bias.index_add(0, rows.flatten(), -affine.shift.flatten().to(bias.dtype))
            new = _producer(new, name, rows, heads, affine.forward_rows)
    return new


def rotate(
    weights: Weights,
    stream: ResidualStream,
    layout: HeadLayout,
    matrix: Tensor,
    norm_offset: float = 0.0,
    outside: bool = False,
) -> Weights:
    """Parameters of a model whose residual stream is x' = x Q: of one block, or those outside the blocks.

    matrix: Q [hidden, hidden], orthogonal, the same in all calls: lengths stay, so an RMSNorm without weights gives x' / |x'|
    = (x / |x|) Q. The norms' weights go into their readers first (QuaRot, Ashkboos et al. 2024, section 4, after SliceGPT,
    Ashkboos et al. 2024, section 3).
    """
    for seam in stream.norms:
        for norm in places(seam.producers, outside):
            scale = weights[f"{norm}.weight"] + norm_offset
            weights = rewrite(weights, seam, layout, Affine(scale[None]), norm_offset, outside)
            weights[f"{norm}.weight"] = torch.full_like(scale, 1 - norm_offset)  # also where the scale is 0
    return rewrite(weights, stream.seam, layout, Affine(matrix.T[None], orthogonal=True), norm_offset, outside)


def _rows_of(weights: Weights, linear: str, seam: Seam) -> Tensor:
    """The rows [1, n] of a linear that write the values of a seam."""
    tensor = weights.get(f"{linear}.weight")
    tensor = weights[f"{linear}.bias"] if tensor is None else tensor  # of a rotated model tensors are read one by one
    n = tensor.shape[0]
    return torch.arange(n // 2 if seam.second_half else 0, n, device=tensor.device)[None]


def _producer(weights: Weights, linear: str, rows: Tensor, heads: int, change: Callable[[Tensor], Tensor]) -> Weights:
    """All weights, with ``change`` applied to rows [heads * repeats, d] of a linear's weight and bias."""
    new, index = dict(weights), rows.flatten()
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if (tensor := weights.get(name)) is None:
            continue
        # [out, in] or [out] -> [heads, repeats, d, in or 1]: heads of queries that share keys have one transform
        picked = rearrange(tensor[index], "(h r d) ... -> h r d (...)", h=heads, d=rows.shape[1])
        changed = rearrange(change(picked), "h r d i -> (h r d) i").view(-1, *tensor.shape[1:])
        new[name] = tensor.index_copy(0, index, changed)
    return new


def _consumer(weights: Weights, linear: str, affine: Affine, repeats: int) -> Weights:
    """A consumer's weight, and its bias where there is a shift."""
    weight = weights[f"{linear}.weight"]
    columns = rearrange(weight, "out (h r d) -> out h r d", h=affine.inverse.shape[0], r=repeats)
    new = {f"{linear}.weight": rearrange(affine.columns(columns), "out h r d -> out (h r d)")}
    if affine.shift is not None:
        moved = weight @ repeat(affine.shift, "h d -> (h r d)", r=repeats)
        new[f"{linear}.bias"] = weights[f"{linear}.bias"] + moved
    return new


def _norm(weights: Weights, norm: str, affine: Affine, offset: float) -> Weights:
    """The norm's weight and bias; of a dense A it takes the shift alone."""
    new: Weights = {}
    bias = weights.get(f"{norm}.bias")
    if affine.shift is not None:
        assert bias is not None
        bias = new[f"{norm}.bias"] = bias - affine.shift[0]
    if affine.dense:
        return new
    scale = affine.inverse[0]
    new[f"{norm}.weight"] = (weights[f"{norm}.weight"] + offset) / scale - offset
    if bias is not None:
        new[f"{norm}.bias"] = bias / scale
    return new
