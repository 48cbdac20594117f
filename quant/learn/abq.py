"""ABQ-LLM: OmniQuant with scales into the down projections, compensation, other losses, and five levels at 2 bits.

- LET also between up and down projections, where the activation function lets a scale through.
- Compensation: W + a bᵀ on the down projections of the first 3 and last 4 blocks, a = 0 and b = 1 at the start.
- Distribution correction: the log-cosine of outputs and targets, on both streams, beside their squared difference.
- Attention awareness: the symmetric KL divergence of the attention probabilities. (The released code takes a
  softmax of probabilities averaged over heads, which leaves almost no signal.)
- Bit balance: 2^bits + 1 levels at 1 and 2 bits. Five levels are 2.32 bits of entropy and 3 stored bits.
  (Zeng et al., AAAI 2025)
"""

from __future__ import annotations

from dataclasses import replace

from quant.learn import recipe
from quant.learn.config import Learning
from quant.learn.omniquant import omniquant


@recipe("abq")
def abq(asked: Learning, wbits: int, abits: int) -> Learning:
    """The row of the paper."""
    found = omniquant(asked, wbits, abits)
    if found.transform.let and not asked.transform.kinds:
        found = replace(found, transform=replace(found.transform, kinds=(*found.transform.kinds, "mul")))
    return replace(found, compensation=True, augmented=True, distribution=True, attention=True)


def balanced_levels(wbits: int, balance: str) -> int | None:
    """Levels of the grid under ``--bit-balance`` on, off or auto (on at 1 and 2 bits); None for 2^wbits."""
    return 2**wbits + 1 if balance == "on" or (balance == "auto" and wbits <= 2) else None
