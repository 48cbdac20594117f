"""Fake quantization of weights: the range of their groups, and the values of the nearest codes, which gradients pass.

Between the two stands `quant.core.grid.range_to_grid`, in training and in deployment, so that the solver gets the grid
that was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.types import Grid, QuantSpec
from quant.kernels.rounding import FakeQuantize, Span


def group_range(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Lowest and highest entry, or 0, of every group: [out, G] each, of weight float [out, in]."""
    grouped = weight.view(weight.shape[0], spec.n_groups(weight.shape[1]), -1)  # [out, G, columns]
    low, high = Span.apply(grouped)
    return low.squeeze(-1).clamp(max=0), high.squeeze(-1).clamp(min=0)


def grid_of(scale: Tensor, zero: Tensor, n_in: int, qmax: int) -> Grid:
    """The grid that the solver gets, of a linear with n_in columns: bit for bit the one that was trained."""
    group = torch.arange(n_in, device=scale.device) // (n_in // scale.shape[1])
    return Grid(scale.detach().float(), zero, group, qmax)


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Values of the nearest codes for weight [out, in], scale and zero [out, G]; gradients pass (see `FakeQuantize`)."""
    grouped = weight.view(weight.shape[0], scale.shape[1], -1)  # [out, G, columns]
    return FakeQuantize.apply(grouped, scale.unsqueeze(-1), zero.to(weight.dtype).unsqueeze(-1), qmax).view_as(weight)
