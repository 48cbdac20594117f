"""Forms of a model that pass its blocks side by side, so that every block is read once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.fake_quant import ActSpec
from quant.blocks.outside import Deployed, OutsideWeights
from quant.blocks.reading import BlockReader
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights

FULL = "fp"
HEAD_ELEMENTS = 1 << 25  # logits computed at a time, or those of one token: 128 MB in float32
HELD_LOGITS = 5  # arrays of that size at once, where divergence to full precision is measured
Deploy = Callable[[int, BlockWeights], BlockWeights]  # block index, full-precision weights -> the variant's weights


@dataclass(frozen=True)
class Variant:
    """A form of the model: its blocks' weights, and how its activations are quantized.

    packed: its linears are packed in every block, and none of theirs is taken from the full-precision weights.
    outside: from the model's weights outside the blocks to its own; None: they are the same.
    """

    deploy: Deploy
    act: ActSpec | None = None
    packed: bool = False
    outside: Deployed | None = None


UNCHANGED = Variant(lambda _, weights: weights)


def captured(
    model: LazyModel, ids: Tensor, variants: Mapping[str, Variant], outside: Weights, **settings: Any
) -> dict[str, BlockStream]:
    """Streams of the tokens in front of the first block, by variant. settings: of the streams."""
    streams: dict[str, BlockStream] = {}
    plain: BlockStream | None = None
    for name, variant in variants.items():
        if variant.outside is not None:
            streams[name] = BlockStream(model, ids, **settings)
            with variant.outside(outside).mounted(model.module) as own:
                streams[name].capture(own)
        elif plain is None:
            streams[name] = plain = BlockStream(model, ids, **settings).capture(outside)
        else:
            streams[name] = plain.fork()
    return streams


def outside_of(variants: Mapping[str, Variant], outside: Weights) -> dict[str, OutsideWeights]:
    """What every variant has outside the blocks; those that change nothing share it."""
    return {
        name: OutsideWeights(outside) if variant.outside is None else variant.outside(outside)
        for name, variant in variants.items()
    }


def tokens_at_a_time(vocabulary: int) -> int:
    """Of how many tokens logits are computed together, where a window has more."""
    return max(1, HEAD_ELEMENTS // vocabulary)


def pass_blocks(
    model: LazyModel,
    variants: Mapping[str, Variant],
    streams: Collection[Mapping[str, BlockStream]],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Carry streams (each by variant) through all blocks, side by side. Linears are read only where a variant needs them."""
    n_blocks = len(model.blocks)
    packed = all(variant.packed for variant in variants.values())

    def without(index: int) -> Collection[str]:
        return model.linear_shapes(index) if packed else ()

    with BlockReader(model, device, n_blocks, without) as reader:
        for index in range(n_blocks):
            weights = reader.read(index)
            for name, variant in variants.items():
                own = variant.deploy(index, weights)
                for by_variant in streams:
                    by_variant[name].run(index, own, advance=True, act=variant.act)
            progress(index + 1, n_blocks)
