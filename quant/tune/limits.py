"""What cannot be tuned, told before any work."""

from __future__ import annotations

import torch

from models.load import LazyModel
from quant.core import env
from quant.core.errors import InputError
from quant.core.types import QuantizedWeight
from quant.tune.codes import TunedLinear
from quant.tune.config import Tuning, batch_of

SHARE = 0.8  # of the free memory that tuning the model may take
PER_WEIGHT = 30  # bytes: position, two moments, gradient, the weight as it is deployed and on its way, the best codes
PER_POSITION = 40  # numbers of the hidden size that a block keeps of a token for its gradients, about
PER_LOGIT = 16  # bytes: of both models, their probabilities and gradients


def check_tuning(
    model: LazyModel, tuning: Tuning, sample: QuantizedWeight, windows: int, seqlen: int, device: torch.device
) -> None:
    """Raise InputError where tuning cannot hold the grid of ``sample``, an answer of the solver; where there are too few
    windows to hold some out; or where the whole model does not fit in memory with its gradients."""
    TunedLinear("a linear", sample, sample.spec)
    batch = batch_of(windows)
    need, free = bytes_of(model, batch * seqlen), env.free_bytes(device)
    if tuning.scope == "model" and need > SHARE * free:
        raise InputError(
            f"--tune model holds the whole model with its gradients in memory, about {need / 1e9:.1f} GB of "
            f"{free / 1e9:.1f} GB that are free: use --tune block"
        )


def bytes_of(model: LazyModel, tokens: int) -> int:
    """What tuning the whole model takes in memory, about, with so many tokens in a step."""
    size, blocks = model.dtype.itemsize, len(model.blocks)
    tuned = sum(out * n_in for out, n_in in model.linear_shapes().values()) * blocks
    whole = sum(parameter.numel() for parameter in model.module.parameters())
    token = PER_LOGIT * model.config.vocab_size + size * PER_POSITION * model.config.hidden_size * blocks
    return PER_WEIGHT * tuned + size * whole + tokens * token
