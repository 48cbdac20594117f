"""Whether every number of a tensor is finite, without a mask of its size."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_everywhere(tensor: Tensor) -> Tensor:
    """bool []: false where there is NaN or an infinity; nobody waits for the device. The extremes say it in one pass: they are
    NaN where any number is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.isfinite(torch.stack(tensor.aminmax())).all()


def all_finite(tensor: Tensor) -> bool:
    """The same as a number of Python's."""
    return bool(finite_everywhere(tensor))
