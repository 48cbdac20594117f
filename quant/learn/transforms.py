"""Equivalent transforms that are learned: what stands at the seams of a block, and how it starts.

A transform stands at one seam, and gives the weights of a block that computes the same function with other numbers
inside. Scales are OmniQuant's LET (and SmoothQuant's, where they start); other kinds take their place by `transform`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from models.family import HeadLayout, ModelFamily, Seam
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn import transform
from quant.learn.affine import Affine, apply_seam
from quant.learn.config import TransformSpec
from quant.learn.parametrization import InputRange, Parameters, Parametrization

SMALLEST_SCALE = 1e-2  # OmniQuant keeps |s| above it
HEAD_KINDS = ("qk", "vo")  # seams between heads, where ``matrix`` puts one for each


def commutes_with_rope(seam: Seam, layout: HeadLayout, spec: TransformSpec) -> bool:
    """Whether a transform at the seam has to commute with rotary embeddings."""
    return seam.kind == "qk" and layout.rope and spec.tied


class Transform(Parametrization):
    """A transform at one seam: a kind of it has `start` and `inverse`. shift: whether it has one."""

    def __init__(
        self, seam: Seam, layout: HeadLayout, spec: TransformSpec, shift: bool, norm_offset: float, rate: float
    ) -> None:
        self.seam, self.layout, self.spec, self.shift = seam, layout, spec, shift
        self.name, self.norm_offset, self.rate = f"{seam.kind}.{seam.producer}", norm_offset, rate

    @abstractmethod
    def start(self, scale: Tensor) -> Parameters:
        """Parameters of the transform that is this scale [heads, d]."""

    @abstractmethod
    def inverse(self, parameters: Parameters) -> Tensor:
        """M = A⁻¹ at effective parameters: a diagonal's entries [heads, d], or dense [heads, d, d]."""

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """SmoothQuant's scale absmax(x)^α / absmax(W)^(1-α), identity on ``qk``; the middle of the inputs as shift."""
        scale, shift = self._smooth(weights, ranges)
        parameters = self.start(scale) | ({"shift": shift} if self.shift else {})
        return {key: tensor.clone() for key, tensor in parameters.items()}

    def _smooth(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> tuple[Tensor, Tensor]:
        """Scale and shift [heads, d]."""
        if self.seam.kind == "qk":
            ones = torch.ones(self.layout.k[1].shape, device=weights.device)
            return ones, torch.zeros_like(ones)
        heads = self.layout.k[1].shape[0] if self.seam.kind == "vo" else 1
        repeats = self.layout.repeats if self.seam.kind == "vo" else 1

        def by_head(channels: Tensor, how: str) -> Tensor:  # [in] -> [heads, d], over the query heads that share them
            return reduce(channels, "(heads repeats d) -> heads d", how, heads=heads, repeats=repeats)

        inputs = ranges[self.seam.consumers[0]]
        assert inputs.absmax is not None and inputs.shift is not None
        largest = torch.stack([weights.weight(c).float().abs().amax(0) for c in self.seam.consumers]).amax(0)
        x = by_head(inputs.absmax.to(largest.device), "max").clamp(min=1e-5)
        w = by_head(largest, "max").clamp(min=1e-5)
        scale = (x**self.spec.alpha / w ** (1 - self.spec.alpha)).clamp(min=1e-5)
        return scale, by_head(inputs.shift.to(largest.device), "mean")

    def affine(self, parameters: Parameters) -> Affine:
        """A at these effective parameters."""
        return Affine(self.inverse(parameters), parameters.get("shift"), self.spec.precise)

    def apply(self, weights: BlockWeights, parameters: Parameters) -> BlockWeights:
        """The block's weights with this transform in them."""
        return apply_seam(weights, self.seam, self.layout, self.affine(parameters), self.norm_offset)


class Scale(Transform):
    """A factor for every channel."""

    def start(self, scale: Tensor) -> Parameters:
        """The scale itself."""
        return {"scale": scale}

    def inverse(self, parameters: Parameters) -> Tensor:
        """The scale, kept away from 0."""
        scale = parameters["scale"]
        return StraightThrough.apply(scale, scale.detach().clamp(min=SMALLEST_SCALE))


class RopeScale(Scale):
    """A factor for every pair (i, i + d/2) of channels that are rotated against each other: [heads, d / 2]."""

    def start(self, scale: Tensor) -> Parameters:
        """Of the first of each pair; both are the same on ``qk``."""
        return {"scale": scale[:, : scale.shape[1] // 2]}

    def inverse(self, parameters: Parameters) -> Tensor:
        """The same factor twice."""
        scale = super().inverse(parameters)
        return torch.cat([scale, scale], 1)


class StraightThrough(torch.autograd.Function):
    """A value in the place of x; the gradient passes, so that what was kept from 0 can move away from it."""

    @staticmethod
    def forward(ctx: object, x: Tensor, value: Tensor) -> Tensor:
        """The value, computed without gradients."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        """As if x had been given."""
        return gradient, None


def transforms_for(
    family: ModelFamily, config: object, weights: BlockWeights, spec: TransformSpec, rate: float
) -> list[Transform]:
    """The transforms of a block; none without ``let``. Shifts stand where producer and consumers have biases."""
    transforms, layout = [], family.heads(config).to(weights.device)
    for seam in family.seams(config) if spec.let else ():
        if seam.kind not in spec.kinds:
            continue
        biased = (layout.v[0] if seam.kind == "vo" else seam.producer, *seam.consumers)
        shift = (
            spec.shift and seam.kind in ("norm", "vo") and all(f"{name}.bias" in weights.parameters for name in biased)
        )
        plain = RopeScale if commutes_with_rope(seam, layout, spec) else Scale
        others = (kind for kind in transform.entries().values() if kind.stands_at(seam, layout, spec))
        transforms.append(next(others, plain)(seam, layout, spec, shift, family.norm_offset, rate))
    return transforms


def check_seams(family: ModelFamily, config: Any, spec: TransformSpec) -> None:
    """Raise InputError where seams are asked for that the model's architecture does not have."""
    if not spec.let:
        return
    reason, kinds = family.no_norm_seams(config), sorted(spec.kinds)
    if "norm" in kinds and reason:
        raise InputError(
            f"this {config.model_type} model's norms cannot be rescaled ({reason}); "
            "use --let-seams vo,qk,mul for the others, or drop --let"
        )
    if spec.norm_matrix and "norm" not in kinds:
        raise InputError("--use_ln_matrix needs the norm seams: add norm to --let-seams")
    there = {seam.kind for seam in family.seams(config)}
    if not there.intersection(kinds):
        raise InputError(
            f"--let: {config.model_type} blocks have no {' or '.join(kinds)} seam; use --let-seams {','.join(sorted(there))}"
        )
    if spec.matrix and not there.intersection(kinds, HEAD_KINDS):
        raise InputError("--use_matrix needs seams between heads: add vo, or qk where the model has it, to --let-seams")
