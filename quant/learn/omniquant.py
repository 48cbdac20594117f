"""OmniQuant: learnable clipping of the weights (LWC) and learnable scales and shifts (LET), block by block.

    min over Θ1, Θ2 of ‖F(W, X) - F(Q_w(W; Θ1, Θ2), Q_a(X̂; Θ2))‖²        (Shao et al., ICLR 2024, equation 1)

Scales stand at norms, between values and the output projection, and between queries and keys, where they only
matter if activations are quantized; so do shifts. `quant.learn.learner` trains, `quant.learn.transforms` transforms.
"""

from __future__ import annotations

from dataclasses import replace

from quant.learn import recipe
from quant.learn.config import Learning


@recipe("omniquant")
def omniquant(asked: Learning, wbits: int, abits: int) -> Learning:
    """The row of the paper: what was asked for, at the paper's seams unless others were named."""
    transform = asked.transform
    if not transform.let or transform.kinds:
        return asked
    kinds = ("norm", "vo", "qk") if abits < 16 else ("norm", "vo")
    return replace(asked, transform=replace(transform, kinds=kinds, shift=abits < 16))
