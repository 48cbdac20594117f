"""How outliers are stored: in float16, or all of a layer's in float32 where float16 loses what they are kept for."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.types import LARGEST, Outliers

HALF_LOSS = 2.0**-10  # relative to a value: more than float16's own rounding, so the value is below its normal numbers
STEP_SHARE = 64  # and more than this part of the grid's step: what the codes would not have lost either
INSIDE = 1 - 2.0**-20  # of the largest magnitude: code and outlier are added in float32, which rounds again


def kept_outliers(
    mask: Tensor, extra: Tensor, coded: Tensor, step: Tensor, largest: float, whole_columns: bool = False
) -> Outliers:
    """Outliers at the places of mask bool [out, in], n of them, in the order of the places.

    extra float32 [n]: what they add. coded float32 [n]: the values of the codes there. step float32 [n]: the scales there.
    largest: what no deployed value exceeds; sums beyond it end there.
    """
    total = coded + extra
    bound = min(largest, LARGEST) * INSIDE
    extra = torch.where(total.abs() > bound, total.clamp(-bound, bound) - coded, extra)
    half = extra.half()
    lost = (extra - half.float()).abs()
    loses = (lost > HALF_LOSS * extra.abs()) & (lost > step / STEP_SHARE)
    beyond = (coded + half.float()).abs() > largest
    value = extra if bool((loses | beyond).any()) else half
    return Outliers(mask.flatten().nonzero().squeeze(1), value, whole_columns)
