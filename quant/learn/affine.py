"""Rewriting the weights of a block at a seam: x' = (x - shift) A, written by the producer, undone by the readers.

One sign convention: readers W' = W A⁻ᵀ, b' = b + W shift; producers V' = Aᵀ V, c' = Aᵀ (c - shift); norms hold a
diagonal A and the shift only. Everything is out of place and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.family import HeadLayout, Seam
from models.load import Weights
from quant.blocks.actquant import ONLINE

ONLINE_DTYPE = torch.float16  # in which it is kept, whatever the checkpoint's own


@dataclass(frozen=True)
class Affine:
    """A by its inverse M, for each head: the diagonal's entries [heads, d], or dense [heads, d, d]. shift [heads, d].

    Seams without heads have one. ``precise`` inverts dense matrices in float64.
    """

    inverse: Tensor
    shift: Tensor | None = None
    precise: bool = False

    @property
    def dense(self) -> bool:
        """Whether M holds more than a diagonal."""
        return self.inverse.dim() == 3

    def matrix(self) -> Tensor:
        """A of a dense transform, [heads, d, d]."""
        inverse = self.inverse.double() if self.precise else self.inverse
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


def apply_seam(weights: Weights, seam: Seam, layout: HeadLayout, affine: Affine, norm_offset: float = 0.0) -> Weights:
    """The block's weights with the transform in them; entries that stay are the same tensors."""
    if seam.kind == "qk":
        written = _write(weights, *layout.q, affine.inverse.shape[0], affine.forward_rows)
        return _write(written, *layout.k, affine.inverse.shape[0], affine.inverse_rows)
    repeats = layout.repeats if seam.kind == "vo" else 1
    read = dict(weights)
    for linear in seam.consumers:
        read |= _read(weights, linear, affine, repeats)
    if seam.kind == "norm":
        return read | _through_norm(weights, seam.producer, affine, norm_offset)
    name, rows = layout.v if seam.kind == "vo" else (seam.producer, _all_rows(weights, seam.producer))
    if affine.shift is not None:
        bias = read[f"{name}.bias"]
        read[f"{name}.bias"] = bias.index_add(0, rows.flatten(), -affine.shift.flatten().to(bias.dtype))
    return _write(read, name, rows, affine.inverse.shape[0], affine.forward_rows)


def _all_rows(weights: Weights, linear: str) -> Tensor:
    weight = weights[f"{linear}.weight"]
    return torch.arange(weight.shape[0], device=weight.device)[None]


def _write(weights: Weights, linear: str, rows: Tensor, heads: int, change: Callable[[Tensor], Tensor]) -> Weights:
    """Apply ``change`` to rows [heads * repeats, d] of a linear's weight and bias."""
    new = dict(weights)
    index = rows.flatten()
    for part in ("weight", "bias"):
        tensor = weights.get(f"{linear}.{part}")
        if tensor is None:
            continue
        picked = tensor[index].view(heads, rows.shape[0] // heads, rows.shape[1], -1)
        changed = change(picked).reshape(index.numel(), *tensor.shape[1:])
        new[f"{linear}.{part}"] = tensor.index_copy(0, index, changed)
    return new


def _read(weights: Weights, linear: str, affine: Affine, repeats: int) -> Weights:
    """A reader's weight, and its bias where there is a shift."""
    weight = weights[f"{linear}.weight"]
    heads, d = affine.inverse.shape[:2]
    columns = weight.view(-1, heads, repeats, d)
    new = {f"{linear}.weight": affine.columns(columns).reshape(weight.shape)}
    if affine.shift is not None:
        moved = affine.shift[:, None].expand(heads, repeats, d).reshape(-1)
        new[f"{linear}.bias"] = weights[f"{linear}.bias"] + weight @ moved
    return new


def _through_norm(weights: Weights, norm: str, affine: Affine, offset: float) -> Weights:
    """The norm's weight and bias; a dense A goes behind the norm as a matrix of its own."""
    new: Weights = {}
    bias = weights.get(f"{norm}.bias")
    if affine.shift is not None:
        assert bias is not None
        bias = new[f"{norm}.bias"] = bias - affine.shift[0]
    if affine.dense:
        new[norm + ONLINE] = affine.matrix()[0]
        return new
    scale = affine.inverse[0]
    new[f"{norm}.weight"] = (weights[f"{norm}.weight"] + offset) / scale - offset
    if bias is not None:
        new[f"{norm}.bias"] = bias / scale
    return new
