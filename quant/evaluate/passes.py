"""Forms of a model that pass its blocks side by side, so that every block is read once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from models.load import LazyModel, Weights
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import Deployed

FULL = "fp"
HEAD_ELEMENTS = 1 << 27  # logits computed at a time: half a gigabyte in float32
Deploy = Callable[[int, Weights], Deployed]  # block index, full-precision weights -> the variant's weights


@dataclass(frozen=True)
class Variant:
    """A form of the model: its blocks' weights, and how its activations are quantized.

    packed: its linears are packed in every block, and none of theirs is taken from the full-precision weights.
    """

    deploy: Deploy
    act: ActSpec | None = None
    packed: bool = False


UNCHANGED = Variant(lambda _, weights: weights)


def pass_blocks(
    model: LazyModel,
    variants: Mapping[str, Variant],
    streams: Collection[Mapping[str, BlockStream]],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Carry streams (each by variant) through all blocks, side by side. Linears are read only where a variant needs them."""
    n_blocks = len(model.blocks)
    linears = [f"{name}.weight" for name in model.linear_shapes()]
    without = linears if all(variant.packed for variant in variants.values()) else []
    for index in range(n_blocks):
        weights = model.block_weights(index, device, without=without)
        for name, variant in variants.items():
            own = variant.deploy(index, weights)
            for by_variant in streams:
                by_variant[name].run(index, own, advance=True, act=variant.act)
        progress(index + 1, n_blocks)
