"""Column scales in a run (``--column-scales``): measured on a block as its turn comes, kept with it, read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.linears import LinearRef
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn.column_scales import KEY, KINDS, column_scales, fold, mean_squares
from quant.learn.config import TransformSpec
from quant.learn.learner import LearnedBlock
from quant.learn.loop import learned_before
from quant.learn.parametrization import Parameters
from quant.run.config import RunConfig
from quant.run.directory import RunDirectory
from quant.run.solving import Recipe


def check_turned(model: LazyModel, run: RunConfig) -> None:
    """Raise InputError where scales would go into the columns of a linear whose input a rotation turns: they are other
    channels' then."""
    transform = TransformSpec() if run.learning is None else run.learning.transform
    asked = {"--column-scales": KINDS if run.column_scales else (), "--let": transform.kinds if transform.let else ()}
    if run.rotation is None or "down" not in run.rotation.kinds:
        return
    turned = model.groups[-1][-1]
    for flag, kinds in asked.items():
        if any(turned in seam.consumers for seam in model.family.seams(model.config) if seam.kind in kinds):
            raise InputError(
                f"{flag} scales the columns of {turned}, whose inputs --rotate down turns: leave down out of --rotate, "
                f"or drop {flag}"
            )


def fold_block(stream: BlockStream, index: int, weights: BlockWeights) -> LearnedBlock:
    """Block ``index`` with scales for the inputs that the stream holds, in full precision behind it; the stream stays in
    front of it."""
    exact = exact_weights(stream.model, index, weights)
    return fold(stream.model, index, exact, column_scales(stream.model, exact, mean_squares(stream, index, weights)))


def folded_before(model: LazyModel, target: RunDirectory, index: int, weights: BlockWeights) -> BlockWeights:
    """The weights that a finished block was learned or solved from: with the scales that its file keeps, if any."""
    folded = folded_again(model, target, index, weights)
    return weights if folded is None else folded.weights


def folded_again(model: LazyModel, target: RunDirectory, index: int, weights: BlockWeights) -> LearnedBlock | None:
    """A finished block with the scales that its file keeps; None where it keeps none."""
    return _folded(model, index, weights, target.read_learned(index))


def _folded(model: LazyModel, index: int, weights: BlockWeights, parameters: Parameters) -> LearnedBlock | None:
    """The block with the scales among the parameters of its file; None where there are none."""
    kept = {name: scale for name, scale in parameters.items() if name.startswith(KEY)}
    return fold(model, index, exact_weights(model, index, weights), kept) if kept else None


def targets_before(
    model: LazyModel, target: RunDirectory, index: int, weights: BlockWeights, recipe: Recipe
) -> Mapping[str, Tensor]:
    """What the linears of a finished block were solved from, float32 [out, in] by name, where that was learned. weights: of
    the block as the checkpoint has it."""
    if recipe.learning is None:
        return {}
    parameters = {name: tensor.to(weights.device) for name, tensor in target.read_learned(index).items()}
    folded = _folded(model, index, weights, parameters)
    exact = exact_weights(model, index, weights) if folded is None else exact_behind(folded)
    learned = {name: tensor for name, tensor in parameters.items() if not name.startswith(KEY)}
    return learned_before(model, index, exact, recipe.spec, recipe.act, recipe.learning, learned).targets


def learned_behind(folded: LearnedBlock, learned: LearnedBlock) -> LearnedBlock:
    """A block that was learned from a folded one, with what both changed."""
    return replace(
        learned,
        tensors=folded.tensors | learned.tensors,
        parameters={**folded.parameters, **learned.parameters},
    )


def exact_behind(folded: LearnedBlock) -> BlockWeights:
    """The folded block with all that is known of what changed, whatever the arithmetic's dtype."""
    linears = {LinearRef.of_module(name).parameter: target for name, target in folded.targets.items()}
    return folded.weights.with_parameters({**linears, **folded.tensors.parameters})


def exact_weights(model: LazyModel, index: int, weights: BlockWeights) -> BlockWeights:
    """The block's weights in float32 where the arithmetic would round those of the checkpoint; else as they are."""
    held = {dtype for name, dtype in model.storage.items() if name.startswith(f"{model.family.blocks}.{index}.")}
    if held == {model.dtype} or model.dtype in (torch.float32, torch.float64):
        return weights
    return BlockWeights.read(model, index, weights.device, torch.float32)
