"""OmniQuant: learnable clipping of the weights (LWC) and learnable scales and shifts (LET), block by block.

    min over Θ1, Θ2 of ‖F(W, X) - F(Q_w(W; Θ1, Θ2), Q_a(X̂; Θ2))‖²        (Shao et al., ICLR 2024, equation 1)

Scales stand at norms, between values and the output projection, and between queries and keys, where they only
matter if activations are quantized; so do shifts. `quant.learn.transforms` has their algebra.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant.blocks.weights import BlockWeights
from quant.core.names import FULL_BITS
from quant.core.types import QuantSpec
from quant.learn import ingredient, recipe
from quant.learn.config import Learning
from quant.learn.parametrization import Block, InputRange, Parameters, Parametrization
from quant.learn.transforms import Transform, transforms_for

INITIAL_LOGIT = 4.0  # σ(4) = 0.982


@recipe("omniquant")
def omniquant(learning: Learning, wbits: int, abits: int) -> Learning:
    """The row of the paper: what was asked for, at the paper's seams unless others were named; shifts where activations are
    quantized."""
    transform = learning.transform
    if not transform.let:
        return learning
    quantized = abits < FULL_BITS
    kinds = transform.kinds or (("norm", "vo", "qk") if quantized else ("norm", "vo"))
    return replace(learning, transform=replace(transform, kinds=kinds, shift=quantized))


@ingredient("let")
def equivalent_transforms(block: Block) -> list[Transform]:
    """LET: a transform at every seam asked for."""
    model, learning = block.model, block.learning
    return transforms_for(model.family, model.config, block.weights, learning.transform, learning.let_lr)


@ingredient("clip")
def weight_clips(block: Block) -> list[WeightClip]:
    """LWC: clips of every linear that is quantized."""
    if block.spec is None:
        return []
    return [WeightClip(linear, block.spec, block.learning.lwc_lr) for linear in block.linears]


class WeightClip(Parametrization):
    """The grid of a group covers [σ(lower)·min, σ(upper)·max] of its weights; logits [out, G] of a linear."""

    def __init__(self, linear: str, spec: QuantSpec, rate: float) -> None:
        self.name, self.linear, self.spec, self.rate = f"clip.{linear}", linear, spec, rate

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """Nearly all of the range, float32."""
        weight = weights.weight(self.linear)
        shape = (weight.shape[0], self.spec.n_groups(weight.shape[1]))
        logits = torch.full(shape, INITIAL_LOGIT, device=weight.device)
        return {"lower": logits, "upper": logits.clone()}

    def clip(self, linear: str, low: Tensor, high: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Both ends of its own linear, shrunk."""
        if linear != self.linear:
            return low, high
        return low * torch.sigmoid(parameters["lower"]), high * torch.sigmoid(parameters["upper"])
