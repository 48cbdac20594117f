"""FlatQuant: a Kronecker pair in front of every linear, matrices of heads, and clips of weights and activations.

    min over P, d, c of ‖F(W, X) - F(Q_c(W diag(1/d) (P1 ⊗ P2)⁻ᵀ), Q_c((X diag(d)) (P1 ⊗ P2)))‖²

(Sun et al., arXiv 2410.09426, equations 3 to 5.) The pairs are shared by all linears that read one tensor and stay in the
model; d goes into the norms, and into the up projection where the function behind it lets a scale through. Values get a
matrix for each head of keys, which goes into the value and the output projection; in front of the latter one across heads
is left. Queries and keys get one matrix behind rotary embeddings. With what comes in as quantized is trained against full
precision (the released code trains on full-precision inputs). Matrices are themselves the parameters, inverted in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant.blocks.online import AND
from quant.blocks.weights import BlockWeights
from quant.core.names import FULL_BITS
from quant.learn import ingredient, recipe
from quant.learn.affine import apply_online
from quant.learn.config import Learning
from quant.learn.parametrization import Block, InputRange, Parameters, Parametrization
from quant.learn.transforms import Transform

CLIP_LOGIT = 4.0  # σ(4) = 0.982
SEAMS = ("norm", "vo", "qk", "mul")


@recipe("flatquant")
def flatquant(learning: Learning, wbits: int, abits: int) -> Learning:
    """The row of the paper. Of the seams asked for (all), ``norm`` and ``mul`` hold scales, ``vo`` and ``qk`` matrices of
    heads; activations are clipped where weights are, if they are quantized."""
    transform, extra = learning.transform, learning.extra_ingredients
    if transform.let:
        kinds = transform.kinds or SEAMS
        scales = tuple(kind for kind in kinds if kind in ("norm", "mul"))
        transform = replace(transform, let=bool(scales), kinds=scales)
        asked = {"values": "vo" in kinds, "heads": "qk" in kinds and abits < FULL_BITS, "kronecker": True}
        extra += tuple(name for name, taken in asked.items() if taken)
    if learning.clip and abits < FULL_BITS:
        extra += ("activation clips",)
    return replace(learning, transform=transform, extra_ingredients=extra, decay=True)


def factors(n: int) -> tuple[int, int]:
    """p1 p2 = n with p1 at most p2 and as near as can be: the cheapest pair."""
    first = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
    return first, n // first


def orthogonal(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float32 [n, n], uniform (Mezzadri 2007): the columns' signs are those of the diagonal."""
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float().contiguous()


@ingredient("kronecker")
def kronecker_pairs(block: Block) -> list[KroneckerPair]:
    """One in front of every group of linears that read one tensor; of the output projection across heads alone, where
    values have matrices of their own."""
    layout = block.model.family.heads(block.model.config)
    output = layout.output if "values" in block.learning.extra_ingredients else None
    heads, rate = layout.q[1].shape[0], block.learning.let_lr
    return [KroneckerPair(group, heads if group == (output,) else None, rate) for group in block.model.groups]


def numbers_beside(
    learning: Learning, inputs: Mapping[tuple[str, ...], int], output: str, heads: int, head_dim: int
) -> int:
    """How many numbers of a block its weights cannot hold. inputs: of every group of linears; output: the linear behind the
    heads."""
    extra, count = learning.extra_ingredients, 0
    if "kronecker" in extra:
        for group, n_in in inputs.items():
            across = heads if "values" in extra and group == (output,) else None
            count += sum(n * n for n in sizes_of(n_in, across))
    if "heads" in extra:
        count += head_dim**2
    return count + (2 * len(inputs) + 6 if "activation clips" in extra else 0)


def sizes_of(n_in: int, across: int | None) -> tuple[int, ...]:
    """Of the matrices in front of n_in inputs; of one, where it is across heads."""
    return factors(n_in) if across is None else (across,)


class KroneckerPair(Parametrization):
    """``left`` P1 [p1, p1] and ``right`` P2 [p2, p2] in front of linears that read one tensor. across: heads that are mixed,
    by P1 alone."""

    def __init__(self, readers: tuple[str, ...], across: int | None, rate: float) -> None:
        self.name, self.readers, self.across, self.rate = f"kronecker.{AND.join(readers)}", readers, across, rate

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """Random orthogonal ones."""
        n_in = weights.weight(self.readers[0]).shape[1]
        sizes = zip(("left", "right"), sizes_of(n_in, self.across), strict=False)
        return {key: orthogonal(n, n).to(weights.device) for key, n in sizes}

    def apply(self, weights: BlockWeights, parameters: Parameters) -> BlockWeights:
        """In front of the readers, which take it back."""
        return apply_online(weights, self.readers, parameters["left"], parameters.get("right"))


@ingredient("values")
def value_matrices(block: Block) -> list[ValueMatrix]:
    """One for each head of keys and values, between the value and the output projection."""
    family, config = block.model.family, block.model.config
    layout, spec = family.heads(config).to(block.weights.device), replace(block.learning.transform, precise=True)
    return [
        ValueMatrix(seam, layout, spec, False, family.norm_offset, block.learning.let_lr)
        for seam in family.seams(config)
        if seam.kind == "vo"
    ]


class ValueMatrix(Transform):
    """M [heads, d, d] = A⁻¹ of values x' = x A, free."""

    def start(self, scale: Tensor) -> Parameters:
        """The scale, then a random rotation: x' = (x / s) R, so that M = Rᵀ diag(s)."""
        turn = orthogonal(scale.shape[1], scale.shape[1]).T.to(scale.device)
        return {"matrix": turn.contiguous() * scale[:, None]}

    def inverse(self, parameters: Parameters) -> Tensor:
        """The matrix itself."""
        return parameters["matrix"]


@ingredient("heads")
def head_matrices(block: Block) -> list[HeadMatrix]:
    """One for all heads of queries and keys, behind rotary embeddings."""
    return [HeadMatrix(attention_of(block), block)]


def attention_of(block: Block) -> str:
    """The module that multiplies queries and keys: that of the query projection."""
    return block.model.family.heads(block.model.config).q[0].rpartition(".")[0]


class HeadMatrix(Parametrization):
    """P [d, d] of queries; keys get P⁻ᵀ."""

    def __init__(self, attention: str, block: Block) -> None:
        self.name, self.attention, self.rate = f"heads.{attention}", attention, block.learning.let_lr
        self.size = block.model.family.heads(block.model.config).q[1].shape[1]

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """A random orthogonal one."""
        return {"matrix": orthogonal(self.size, self.size).to(weights.device)}

    def apply(self, weights: BlockWeights, parameters: Parameters) -> BlockWeights:
        """Where heads are multiplied."""
        return replace(weights, head_matrices={**weights.head_matrices, self.attention: parameters["matrix"]})


@ingredient("activation clips")
def activation_clips(block: Block) -> list[ActivationClip]:
    """Of every tensor that linears read, and of queries, keys and values."""
    rate = block.learning.lwc_lr
    inputs = [ActivationClip("input_clips", AND.join(group), (2,), rate) for group in block.model.groups]
    return [*inputs, ActivationClip("head_clips", attention_of(block), (3, 2), rate)]


class ActivationClip(Parametrization):
    """The range of a token is [σ(low) min, σ(high) max]; ``logits`` [..., 2]. part: of BlockWeights, key: in it."""

    def __init__(self, part: str, key: str, shape: tuple[int, ...], rate: float) -> None:
        self.name, self.part, self.key, self.shape, self.rate = f"{part}.{key}", part, key, shape, rate

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """Nearly all of the range."""
        return {"logits": torch.full(self.shape, CLIP_LOGIT, device=weights.device)}

    def apply(self, weights: BlockWeights, parameters: Parameters) -> BlockWeights:
        """Factors in (0, 1)."""
        own = {**getattr(weights, self.part), self.key: torch.sigmoid(parameters["logits"])}
        return replace(weights, **{self.part: own})
