"""Calibration windows as a run takes them: whether they are enough, and a few that are kept out of them to measure on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.written import text_of
from quant.blocks.stream import BlockStream
from quant.core.names import FULL_BITS
from quant.run.config import RunConfig
from quant.run.inputs import Inputs

HELDOUT, HELDOUT_SEED = 4, 1_000_003  # windows; their seed lies this far from that of calibration
RUN = 16  # tokens by which an overlap of two windows is seen
SETTLED = 4  # tokens an input from which the error on other text hardly falls any more (measured: docs/footguns.md)
log = logging.getLogger(__name__)


def shortage(run: RunConfig, shapes: Mapping[str, tuple[int, int]], seqlen: int) -> str | None:
    """What to say where a linear has more inputs than there are calibration tokens, and what would be enough; None where
    all have fewer, or nothing is fitted to the tokens. shapes: (out, in) of a block's linears."""
    tokens, widest = run.windows * seqlen, max(shapes, key=lambda name: shapes[name][1])
    n_in = shapes[widest][1]
    if tokens >= n_in or run.wbits == FULL_BITS or run.solver == "rtn":
        return None
    short = sum(own > tokens for _, own in shapes.values())
    enough = -(-n_in // seqlen)
    return (
        f"too little calibration: {tokens} tokens ({run.windows} x {seqlen}) for {short} of {len(shapes)} linears of a "
        f"block, which have up to {n_in} inputs ({widest}); the answers may be worse than rounding to nearest on other text. "
        f"--nsamples {enough} gives a token for every input, --nsamples {SETTLED * enough} is where errors settle"
    )


def calibration_stream(inputs: Inputs, run: RunConfig, directory: Path) -> BlockStream:
    """The calibration windows in front of the first block, and with them a few of the same text that are kept out of what
    is solved, to measure errors on."""
    stream, ids = inputs.calibration_stream(run, directory), heldout_windows(inputs, run)
    if len(ids):
        stream.attach(inputs.calibration_stream(run, directory, ids))
    else:
        log.warning(
            "%s has no room for windows beside those of calibration: the errors of the linears are those on calibration "
            "itself, which are the smaller ones", run.dataset,
        )  # fmt: skip
    return stream


def heldout_windows(inputs: Inputs, run: RunConfig) -> Tensor:
    """At most HELDOUT windows [n, seqlen] of the calibration text that do not overlap with those of calibration."""
    calibration = inputs.calibration(run)
    source = text_of(run.dataset) or "self"
    drawn = inputs.calibration(replace(run, dataset=source, nsamples=2 * HELDOUT, seed=run.seed + HELDOUT_SEED))
    apart = windows_apart(drawn.ids, calibration.ids)
    return apart[:: max(1, len(apart) // HELDOUT)][:HELDOUT]


def windows_apart(drawn: Tensor, others: Tensor) -> Tensor:
    """Those windows of ``drawn`` [n, T] that overlap with none of ``others`` [m, T]: of two windows of one text that do, one
    holds the start of the other. Starts are RUN tokens; shorter overlaps pass."""
    run = min(RUN, drawn.shape[1])

    def overlaps(window: Tensor) -> bool:
        inside = (others.unfold(1, run, 1) == window[:run]).all(-1).any()  # [m, T - run + 1, run]
        return bool(inside | (window.unfold(0, run, 1)[:, None] == others[:, :run]).all(-1).any())

    return drawn[torch.tensor([not overlaps(window) for window in drawn])]
