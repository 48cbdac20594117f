"""What is known of a linear's inputs before it is solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.gram import GramStats
from quant.core.sample import InputSample

HELDOUT_TOKENS = (
    512  # that errors are measured on, spread over the windows kept out (docs/performance.md says why not more)
)


@dataclass(frozen=True)
class InputStats:
    """What is known of the inputs of a group of linears: the statistics that are solved with, and inputs at tokens that
    were kept out of them, to measure on; None where there are none. weighted: by linear, the statistics that parts of its rows
    are solved with instead, where tokens count differently for each. routed: of an expert, how many tokens were routed to it;
    None where linears read all tokens."""

    calibration: GramStats
    heldout: InputSample | None = None
    weighted: Mapping[str, Sequence[GramStats]] = field(default_factory=dict)
    routed: int | None = None


@dataclass(frozen=True)
class Original:
    """The original model beside the quantized one, in front of the same block: its stream, the block's weights in full
    precision, and for linears that add to the residual stream the module whose input that stream is."""

    stream: BlockStream
    weights: BlockWeights
    residual_at: Mapping[str, str] = field(default_factory=dict)
