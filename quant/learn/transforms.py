"""Equivalent transforms that are learned: what they are made of, how they start, how they reach the weights.

A transform stands at one seam. Its parameters are plain tensors by name; `apply` gives the weights of a block
that computes the same function with other numbers inside. Scales are OmniQuant's LET (and SmoothQuant, where they
start), matrices are AffineQuant's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.family import HeadLayout, ModelFamily, Seam
from models.load import Weights
from quant.core.errors import InputError
from quant.learn.affine import Affine, apply_seam
from quant.learn.config import TransformSpec

SMALLEST_SCALE = 1e-2  # OmniQuant keeps |s| above it
HEAD_KINDS = ("qk", "vo")  # seams between heads, where ``matrix`` puts one for each
Parameters = dict[str, Tensor]


class InputRange:
    """What the calibration inputs x [..., in] of a linear span: largest |x| of each channel, and its middle.

    shift: moving average over windows of (max + min) / 2, with OmniQuant's weight of 0.99 for the past.
    """

    def __init__(self, absmax: Tensor | None = None, shift: Tensor | None = None) -> None:
        self.absmax, self.shift = absmax, shift

    def update(self, x: Tensor) -> None:
        """Add a batch of windows [n, T, in], or rows of one window [T, in]."""
        for window in x.reshape(-1, *x.shape[-2:]).float():
            low, high = window.amin(0), window.amax(0)
            largest, middle = torch.maximum(-low, high).clamp_(min=0), (low + high) / 2
            self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
            self.shift = middle if self.shift is None else 0.99 * self.shift + 0.01 * middle


@dataclass(frozen=True)
class Transform:
    """One transform at one seam."""

    seam: Seam
    layout: HeadLayout
    spec: TransformSpec
    shift: bool
    norm_offset: float

    @property
    def name(self) -> str:
        """Prefix of its parameters."""
        return f"{self.seam.kind}.{self.seam.producer}"

    @property
    def dense(self) -> bool:
        """Whether it is a matrix."""
        return (self.spec.norm_matrix and self.seam.kind == "norm") or (
            self.spec.matrix and self.seam.kind in HEAD_KINDS
        )

    @property
    def rotates(self) -> bool:
        """Whether it must commute with rotary embeddings."""
        return self.seam.kind == "qk" and self.layout.rope and self.spec.tied

    def initial(self, weights: Weights, ranges: Mapping[str, InputRange]) -> Parameters:
        """Parameters to start from: SmoothQuant's scale absmax(x)^α / absmax(W)^(1-α), identity on ``qk``."""
        scale, shift = self._smooth(weights, ranges)
        found: Parameters = {}
        if self.rotates:
            half = scale[:, : scale.shape[1] // 2]
            found = {"real": half, "imaginary": torch.zeros_like(half)} if self.dense else {"scale": half}
        else:
            found = {"matrix": torch.diag_embed(scale)} if self.dense else {"scale": scale}
        if self.shift:
            found["shift"] = shift
        return {f"{self.name}.{part}": tensor.clone() for part, tensor in found.items()}

    def _smooth(self, weights: Weights, ranges: Mapping[str, InputRange]) -> tuple[Tensor, Tensor]:
        """Scale and shift [heads, d]."""
        if self.seam.kind == "qk":
            ones = torch.ones(self.layout.k[1].shape, device=weights[f"{self.layout.k[0]}.weight"].device)
            return ones, torch.zeros_like(ones)
        heads = self.layout.k[1].shape[0] if self.seam.kind == "vo" else 1
        repeats = self.layout.repeats if self.seam.kind == "vo" else 1
        span = ranges[self.seam.consumers[0]]
        assert span.absmax is not None and span.shift is not None
        largest = torch.stack([weights[f"{c}.weight"].float().abs().amax(0) for c in self.seam.consumers]).amax(0)
        x = span.absmax.to(largest.device).view(heads, repeats, -1).amax(1).clamp(min=1e-5)
        w = largest.view(heads, repeats, -1).amax(1).clamp(min=1e-5)
        scale = (x**self.spec.alpha / w ** (1 - self.spec.alpha)).clamp(min=1e-5)
        return scale, span.shift.to(largest.device).view(heads, repeats, -1).mean(1)

    def masked(self, parameters: Mapping[str, Tensor], progress: float) -> Parameters:
        """The parameters with AffineQuant's gradual mask in the matrix; ``progress`` in [0, 1] opens it."""
        name = f"{self.name}.matrix"
        if name not in parameters:
            return dict(parameters)
        matrix = parameters[name]
        mask = gradual_mask(matrix.shape[-1], progress, self.spec.stability, matrix)
        return {**parameters, name: matrix * mask}

    def affine(self, parameters: Mapping[str, Tensor]) -> Affine:
        """A at these (masked) parameters."""
        part = lambda key: parameters[f"{self.name}.{key}"]  # noqa: E731
        shift = part("shift") if self.shift else None
        if not self.dense:
            scale = Floor.apply(part("scale"))
            return Affine(torch.cat([scale, scale], 1) if self.rotates else scale, shift)
        matrix = _rotating(*floored_factors(part("real"), part("imaginary"))) if self.rotates else part("matrix")
        return Affine(matrix, shift, self.spec.precise)

    def apply(self, weights: Weights, parameters: Mapping[str, Tensor]) -> Weights:
        """The block's weights with this transform in them."""
        return apply_seam(weights, self.seam, self.layout, self.affine(parameters), self.norm_offset)


class Floor(torch.autograd.Function):
    """max(s, SMALLEST_SCALE); the gradient passes, so that a scale can come back."""

    @staticmethod
    def forward(ctx: object, scale: Tensor) -> Tensor:
        """Clamp."""
        return scale.clamp(min=SMALLEST_SCALE)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Straight through."""
        return gradient


def floored_factors(real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex factors [heads, d / 2] as [2, heads, d / 2], lengthened to SMALLEST_SCALE where |a + bi| is below it."""
    return FloorModulus.apply(torch.stack([real, imaginary]))


class FloorModulus(torch.autograd.Function):
    """a + bi times max(1, SMALLEST_SCALE / |a + bi|), 0 becomes SMALLEST_SCALE; the gradient passes as in `Floor`."""

    @staticmethod
    def forward(ctx: object, factors: Tensor) -> Tensor:
        """Lengthen factors [2, ...]."""
        size = torch.hypot(*factors)
        grown = factors * (SMALLEST_SCALE / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(min=1)
        grown[0] = torch.where(size == 0, SMALLEST_SCALE, grown[0])
        return grown

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Straight through."""
        return gradient


def _rotating(real: Tensor, imaginary: Tensor) -> Tensor:
    """Matrices [heads, d, d] that commute with the rotation of the pairs (i, i + d/2): one complex factor a pair."""
    a, b = torch.diag_embed(real), torch.diag_embed(imaginary)
    return torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)


def gradual_mask(n: int, progress: float, stability: float, like: Tensor) -> Tensor:
    """AffineQuant's mask [n, n]: 1 on the diagonal, ``stability`` on a band around it that opens with progress.

    The band reaches int((n - 1) · progress) + 1 off the diagonal, so one epoch alone sees it open.
    """
    position = torch.arange(n, device=like.device)
    distance = (position[:, None] - position).abs()
    band = (distance <= int((n - 1) * progress) + 1).to(like.dtype) * stability
    return torch.where(distance == 0, 1.0, band)


def dominance(matrix: Tensor) -> Tensor:
    """How far every row of matrices [heads, n, n] is from losing strict diagonal dominance: 1 - Σ|off| / |diagonal|.

    Positive rows everywhere make the matrix invertible (Levy-Desplanques; AffineQuant, section 3.3).
    """
    size = matrix.abs()
    diagonal = size.diagonal(dim1=-2, dim2=-1)
    return 2 - size.sum(-1) / diagonal.clamp_min(torch.finfo(matrix.dtype).tiny)


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


def transforms_for(family: ModelFamily, config: object, weights: Weights, spec: TransformSpec) -> list[Transform]:
    """The transforms of a block; none without ``let``. Shifts stand where producer and readers have biases."""
    found, layout = [], family.heads(config).to(next(iter(weights.values())).device)
    for seam in family.seams(config) if spec.let else ():
        if seam.kind not in spec.kinds:
            continue
        holders = (layout.v[0] if seam.kind == "vo" else seam.producer, *seam.consumers)
        shift = spec.shift and seam.kind in ("norm", "vo") and all(f"{name}.bias" in weights for name in holders)
        found.append(Transform(seam, layout, spec, shift, family.norm_offset))
    return found
