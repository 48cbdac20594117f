"""Number formats whose levels are not evenly spaced: w = scale * level[code], codes in ascending order of their levels.

nvfp4     E2M1 levels, a scale in E4M3 for 16 columns, and one float32 number for the whole tensor
mxfp4     E2M1 levels, a power of two for 32 columns (OCP Microscaling Formats 1.0, sections 5.2 and 6.3)
fp8       E4M3 levels (Micikevicius et al., arXiv 2209.05433, Table 1), a float32 scale a row, or for 128 x 128 weights
iq4_nl    the sixteen levels of llama.cpp's IQ4_NL, a float16 scale for 32 columns
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

Table = tuple[float, ...]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FEW = 16  # levels that are counted one by one
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9


def _signed(magnitudes: Table) -> Table:
    return (*(-level for level in reversed(magnitudes[1:])), *magnitudes)


def _e4m3() -> Table:
    fine = [mantissa * E4M3_SMALLEST for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)]
    return _signed((*fine, *normal[:-1]))  # the last would be NaN


TABLES: dict[str, Table] = {
    "nvfp4": _signed(E2M1),
    "mxfp4": _signed(E2M1),
    "fp8": _e4m3(),
    "iq4_nl": (
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    ),
}  # fmt: skip


@lru_cache(maxsize=64)
def level_tensors(table: Table, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The levels [n], and the middles between neighbours [n - 1], both exact in every float dtype of 16 bits and more."""
    levels = torch.tensor(table, device=device, dtype=dtype)
    return levels, (levels[1:] + levels[:-1]) / 2


def level_codes(ratio: Tensor, table: Table) -> Tensor:
    """Nearest codes of weights over their scales, int64; half way between two levels the lower one is taken."""
    if len(table) > FEW:
        return torch.bucketize(ratio.contiguous(), level_tensors(table, ratio.device, ratio.dtype)[1])
    codes = torch.zeros(ratio.shape, dtype=torch.uint8, device=ratio.device)
    for low, high in pairwise(table):  # in two thirds of the time of torch's search
        codes += ratio > (low + high) / 2
    return codes.long()


def levels_of(codes: Tensor, table: Table, dtype: torch.dtype = torch.float32) -> Tensor:
    """The levels of codes of any dtype, in ``dtype``."""
    return level_tensors(table, codes.device, dtype)[0][codes.long()]
