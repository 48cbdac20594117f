"""Forms of a model that pass its blocks side by side, so that every block is read once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights

FULL = "fp"
HEAD_ELEMENTS = 1 << 25  # logits computed at a time, or those of one window: 128 MB in float32
HELD_LOGITS = 5  # arrays of that size at once, where divergence to full precision is measured
Deploy = Callable[[int, BlockWeights], BlockWeights]  # block index, full-precision weights -> the variant's weights


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
    without = list(model.linear_shapes()) if all(variant.packed for variant in variants.values()) else []
    for index in range(n_blocks):
        weights = BlockWeights.read(model, index, device, without=without)
        for name, variant in variants.items():
            own = variant.deploy(index, weights)
            for by_variant in streams:
                by_variant[name].run(index, own, advance=True, act=variant.act)
        progress(index + 1, n_blocks)
