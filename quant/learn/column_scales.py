"""Column scales at the seams that fold (``--column-scales``): inputs and weight columns of a block made alike, exactly.

At every seam, for every channel of what is written there,

    d = rms(x)^1/2 / rms(W columns)^1/2      x' = x / d,   W' = W d

with x the inputs and W the columns of all linears that read them together. d goes into norms, into the rows of a linear
in front, and into biases: no bits, no operation. A channel that another scale c makes large has d c in place of d, so
that planted or natural outlier scales are gone, whatever c is. SmoothQuant's balance (Xiao et al. 2023, equation 4) with root mean squares in the
place of maxima; scales of columns that a seam takes in: DSQ of D2Quant (2026).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import reduce
from torch import Tensor

from models.family import HeadLayout, Seam
from models.load import LazyModel
from quant.blocks.linears import LinearRef
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.learn.affine import Affine, apply_seam
from quant.learn.learner import LearnedBlock
from quant.learn.parametrization import Parameters

KINDS = ("vo", "mul", "norm")  # of seams; queries and keys have no reader whose columns would be scaled
KEY = "columns."  # of what a block's file keeps: d of a seam, behind its kind and producer


class MeanSquares:
    """Mean squares of the inputs of a linear by channel, float64 [in]."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.n_tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs x [..., in] of any floating dtype."""
        rows = x.reshape(-1, x.shape[-1])
        squares = rows.float().square().sum(0).double()
        self.sum = squares if self.sum is None else self.sum + squares
        self.n_tokens += rows.shape[0]

    def add_up(self) -> None:
        """Take in what all processes of this job have seen."""
        assert self.sum is not None
        ranks.all_sum_(self.sum)
        self.n_tokens = sum(ranks.all_told(self.n_tokens))

    @property
    def mean(self) -> Tensor:
        """What was seen."""
        assert self.sum is not None
        return self.sum / self.n_tokens


def mean_squares(stream: BlockStream, index: int, weights: BlockWeights) -> dict[str, Tensor]:
    """Mean squares of the inputs of every linear of block ``index``, float64 [in]; the stream stays in front of it."""
    groups = stream.model.groups
    seen = {group[0]: MeanSquares() for group in groups}
    stream.run(index, weights, observe={name: one.update for name, one in seen.items()})
    for one in seen.values():
        one.add_up()
    return {name: seen[group[0]].mean for group in groups for name in group}


def column_scales(model: LazyModel, weights: BlockWeights, inputs: Mapping[str, Tensor]) -> Parameters:
    """d of every seam of a block, float32 [heads, d] (seams without heads have one), by name.

    weights: of the block as it stands in the checkpoint. inputs: mean squares by linear, as `mean_squares` gives them.
    """
    layout, scales = model.family.heads(model.config).to(weights.device), Parameters()
    for seam in _seams(model):
        scale = scales[_name(seam)] = _balance(seam, layout, weights, inputs)
        weights = apply_seam(weights, seam, layout, Affine(scale.to(weights.weight(seam.consumers[0]).dtype)))
    return scales


def _seams(model: LazyModel) -> list[Seam]:
    """Norms last: the rows of their readers, which other seams scale, are then what they will be."""
    seams = [seam for seam in model.family.seams(model.config) if seam.kind in KINDS]
    return sorted(seams, key=lambda seam: KINDS.index(seam.kind))


def _name(seam: Seam) -> str:
    return f"{KEY}{seam.kind}.{seam.producer}"


def _balance(seam: Seam, layout: HeadLayout, weights: BlockWeights, inputs: Mapping[str, Tensor]) -> Tensor:
    """The scales of a seam; 1 for channels that are never used, or that nobody reads."""
    heads, repeats = (layout.k[1].shape[0], layout.repeats) if seam.kind == "vo" else (1, 1)

    def by_head(channels: Tensor) -> Tensor:  # [in] -> [heads, d], over the query heads that share them
        return reduce(channels, "(heads repeats d) -> heads d", "mean", heads=heads, repeats=repeats)

    columns = torch.cat([weights.weight(name).double() for name in seam.consumers]).square().mean(0)
    x, w = by_head(inputs[seam.consumers[0]].to(columns.device)), by_head(columns)
    scale = (x / w) ** 0.25  # both are squares
    return torch.where((x > 0) & (w > 0) & scale.isfinite(), scale, 1.0).float()


def fold(model: LazyModel, index: int, weights: BlockWeights, scales: Parameters) -> LearnedBlock:
    """Block ``index`` with its scales folded, which is what is solved then; it has no grids yet.

    weights: of the block as it stands in the checkpoint, computed with in float32 (or float64). The norms and biases are as a checkpoint
    stores them, and the columns take what the norms became in that dtype, so that only biases are rounded; the answer's
    parameters are the scales with that in them, and fold to the same again.
    """
    layout, offset = model.family.heads(model.config).to(weights.device), model.family.norm_offset
    wide = torch.promote_types(model.dtype, torch.float32)
    floats = {name: t.to(wide) for name, t in weights.parameters.items() if t.is_floating_point()}
    weights = folded = weights.with_parameters(floats)
    effective = Parameters()
    for seam in _seams(model):
        scale = scales[_name(seam)].to(weights.device)
        if seam.kind == "norm":
            name = f"{seam.producer}.weight"
            scale = _as_stored(folded.parameters[name] + offset, scale, offset, model.storage_of(name, index))
        effective[_name(seam)] = scale.to(wide)
        folded = apply_seam(folded, seam, layout, Affine(scale.to(wide)), offset)
    linears = {LinearRef.of_module(name).parameter: name for group in model.groups for name in group}
    new = folded.since(weights).parameters
    changed = {name: t.to(model.storage_of(name, index)) for name, t in new.items() if name not in linears}
    folded = folded.with_parameters(changed)
    own = {name: t.to(model.dtype) for name, t in folded.parameters.items() if t.is_floating_point()}
    return LearnedBlock(
        weights=folded.with_parameters(own),
        targets={name: folded.weight(name).float() for name in linears.values()},
        grids={},
        tensors=BlockWeights(changed),
        parameters=effective,
        log={},
    )


def unfold(model: LazyModel, weights: BlockWeights, scales: Parameters) -> BlockWeights:
    """A block's weights with the columns and rows that they had before scales were folded. scales: those of `fold`'s answer."""
    layout = model.family.heads(model.config).to(weights.device)
    for seam in _seams(model):
        inverse = Affine(1 / scales[_name(seam)].to(weights.device))
        weights = apply_seam(weights, seam, layout, inverse, model.family.norm_offset)
    return weights


def _as_stored(norm: Tensor, scale: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The scales [1, d] that a norm's factors [d] are divided by once the quotients are stored in a dtype; 1 where no
    quotient that could be undone is stored."""
    stored = (norm / scale[0] - offset).to(dtype).to(norm.dtype) + offset
    ratio = norm / stored
    return torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)[None]
