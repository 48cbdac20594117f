"""Learnable weight clipping (OmniQuant's LWC).

The grid of a group covers [σ(lower)·min, σ(upper)·max] of its weights. Training and deployment share the one
formula of `quant.core.grid.range_to_grid`, so that what is trained is what the solver gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.grid import range_to_grid
from quant.core.rounding import FakeQuantize
from quant.core.types import Grid, QuantSpec, group_index

INITIAL_LOGIT = 4.0  # σ(4) = 0.982


def clip_logits(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Starting logits of both ends, float32 [out, G]."""
    shape = (weight.shape[0], spec.n_groups(weight.shape[1]))
    logits = torch.full(shape, INITIAL_LOGIT, device=weight.device)
    return logits, logits.clone()


def clipped_scale_zero(
    weight: Tensor, spec: QuantSpec, lower: Tensor | None = None, upper: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale [out, G] (differentiable) and zero point [out, G] (float, without gradient) of weight float [out, in]."""
    grouped = weight.view(weight.shape[0], spec.n_groups(weight.shape[1]), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if lower is not None and upper is not None:
        low, high = low * torch.sigmoid(lower), high * torch.sigmoid(upper)
    scale, zero = range_to_grid(low, high, spec)
    return scale, zero.to(weight.dtype)


@torch.no_grad()
def clipped_grid(weight: Tensor, spec: QuantSpec, lower: Tensor | None = None, upper: Tensor | None = None) -> Grid:
    """The grid that the solver gets: bit for bit the one that was trained."""
    scale, zero = clipped_scale_zero(weight, spec, lower, upper)
    group = group_index(weight.shape[1], spec.group_size, weight.device)
    return Grid(scale.float(), zero.to(torch.int32), group, spec.qmax)


def quantize_through(weight: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Values of the nearest codes for weight [out, in], scale and zero [out, G]; gradients pass (see `FakeQuantize`)."""
    grouped = weight.view(weight.shape[0], scale.shape[1], -1)
    return FakeQuantize.apply(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), qmax).view_as(weight)
