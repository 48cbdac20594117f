"""Whether every number of a tensor is finite, without a mask of its size."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """False where there is NaN or an infinity. The extremes say it in one pass: they are NaN where any number is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
