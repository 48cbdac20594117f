"""Adam's moments in half of their bytes: bfloat16, rounded up or down by chance, so that the mean of many steps stays.

The second moment v moves by at most a thousandth of itself where gradients vanish, and bfloat16 has a step of 1/128 of v:
to the nearest, v would rise with large gradients and never fall again. Rounded up with the probability of what is cut
off (Gupta et al. 2015, arXiv 1502.02551, section 3), its expectation is the exact one. Chance is drawn from the seed, the step and
the place of a tensor alone: one number for every row and one for every column, added, so that no step draws a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWER = 16  # bits of a float32 that bfloat16 has not


def halved(exact: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 of float32 numbers: either of the two neighbours, each with the probability that makes the mean exact.

    Over the draws of the generator every entry is even on its own; entries of one row and column are not independent.
    """
    noise = torch.zeros((), dtype=torch.int32, device=exact.device)
    for axis, size in enumerate(exact.shape or (1,)):
        own = torch.randint(1 << LOWER, (size,), dtype=torch.int32, generator=generator)
        noise = noise + own.to(exact.device).view([-1 if i == axis else 1 for i in range(exact.dim())])
    bits = exact.view(torch.int32) + (noise & ((1 << LOWER) - 1))  # of the magnitude: the sign is a bit apart
    return (bits & -(1 << LOWER)).view(torch.float32).to(torch.bfloat16)


def chance(seed: int, step: int, place: int) -> torch.Generator:
    """What decides how a tensor's moments are rounded at a step."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_000_003 + place) % (1 << 63))
