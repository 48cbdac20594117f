"""Token weights in a run (``--saliency R``): the backward pass before the first block is solved, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.load import LazyModel
from quant.blocks.backward import backward
from quant.blocks.saliency import TokenWeights
from quant.blocks.stream import BlockStream
from quant.core import env
from quant.core.errors import InputError
from quant.run.config import RunConfig

SHARE = 0.8  # of the free memory that hidden states may take
Progress = Callable[[str, int, int, str], None]  # stage, done, total, note


def check_saliency(model: LazyModel, run: RunConfig, tokens: int, store: str, device: torch.device) -> None:
    """Raise InputError where the hidden states of the backward pass do not fit in memory. tokens: of calibration; store: where
    hidden states are kept (of the disk, the space is looked at with all else that is written there)."""
    if run.gradient_labels is None or store == "disk":
        return
    held = run.gradient_labels.states_held(len(model.blocks))
    need = held * tokens * model.config.hidden_size * model.dtype.itemsize
    free = env.free_bytes(device if store == "device" else torch.device("cpu"))
    if need > SHARE * free:
        raise InputError(
            f"--saliency keeps the hidden states in front of all blocks, about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB that "
            "are free: use --activation-store disk, or a smaller --nsamples"
        )


def token_weights(stream: BlockStream, run: RunConfig, n_blocks: int, progress: Progress) -> TokenWeights | None:
    """What the tokens of calibration weigh for the linears of the blocks that are quantized; None where that is not asked
    for. stream: full precision in front of the first block, where it stays."""
    if run.gradient_labels is None:
        return None
    tokens = TokenWeights(stream, run.saliency, n_blocks)
    backward(stream, run.gradient_labels, [tokens], lambda done, total: progress("saliency", done, total, "gradients"))
    return tokens
