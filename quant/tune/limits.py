"""What tuning takes, and what cannot be tuned: told before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from models.load import LazyModel
from quant.core import env
from quant.core.errors import InputError
from quant.core.types import QuantizedWeight
from quant.tune.block import LINEARS
from quant.tune.config import Tuning, batch_of, split
from quant.tune.optimize import VALIDATIONS

SHARE = 0.8  # of the free memory that tuning the model may take
STATE = {"adam": 21, "sign": 13}  # bytes a weight: its parameter, gradient, best iterate, solved code; two moments
GRAPH = {"position": 4, "offset": 8}  # bytes a weight, besides the weight as it is deployed, kept for gradients
WIDE = 4  # bytes a weight: of the original in float32, which offsets are added to
PER_POSITION = 40  # numbers of the hidden size that a block keeps of a token for its gradients, about
PER_LOGIT = 16  # bytes: of both models, their probabilities and gradients
OVERHEAD = 2.0  # of a step over its matrix products: measured 1.5 to 2.4 on a CPU with batches of 1024 tokens


@dataclass(frozen=True)
class Sizes:
    """Of a model: weights of the linears of a block, its parameters, blocks that are tuned, blocks, parameters outside."""

    linears: int
    block: int
    tuned: int
    blocks: int
    outside: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model: LazyModel, tuned: int) -> Sizes:
        """Those of an open model."""
        linears = sum(out * n_in for out, n_in in model.linear_shapes().values())
        block = sum(p.numel() for p in model.blocks[0].parameters())
        whole = sum(p.numel() for p in model.module.parameters())
        blocks, config = len(model.blocks), model.config
        return cls(linears, block, tuned, blocks, whole - block * blocks, config.hidden_size, config.vocab_size)


def check_tuning(
    model: LazyModel, tuning: Tuning, sample: QuantizedWeight, windows: int, seqlen: int, device: torch.device
) -> None:
    """Raise InputError where tuning cannot hold the grid of ``sample``, an answer of the solver; where there are too few
    windows to hold some out; or where the whole model does not fit in memory with its gradients."""
    LINEARS[tuning.form]("a linear", sample, sample.spec, sample.dequantize())
    tokens, free = batch_of(windows) * seqlen, env.free_bytes(device)
    sizes, size = Sizes.of(model, len(model.blocks)), model.dtype.itemsize
    need = memory(sizes, tuning, size, tokens)
    if tuning.scope == "model" and need > SHARE * free:
        fits = memory(sizes, replace(tuning, recompute=True), size, tokens) <= SHARE * free
        raise InputError(
            f"--tune model holds the whole model with its gradients in memory, about {need / 1e9:.1f} GB of "
            f"{free / 1e9:.1f} GB that are free: use {'--tune-recompute' if fits else '--tune block'}"
        )


def memory(sizes: Sizes, tuning: Tuning, itemsize: int, tokens: int) -> float:
    """Bytes on the device, about, with so many tokens in a step. itemsize: bytes of a number of the arithmetic."""
    whole = tuning.scope == "model"
    tuned, through = (sizes.tuned, sizes.blocks) if whole else (1, 1)
    state = STATE[tuning.optimizer] + (WIDE if tuning.form == "offset" else 0)
    graph = GRAPH[tuning.form] + itemsize
    weights = sizes.linears * (state * tuned + graph * (1 if tuning.recompute else tuned))
    kept = PER_POSITION + through if tuning.recompute else PER_POSITION * through
    answers = whole or tuning.last != "mse"  # the model's logits are asked for
    others = itemsize * (sizes.block * through + (sizes.outside if answers else 0))
    return weights + others + tokens * (itemsize * sizes.hidden * kept + PER_LOGIT * sizes.vocabulary * answers)


def flops(sizes: Sizes, tuning: Tuning, windows: int, seqlen: int) -> float:
    """Of the matrix products of all steps and validations, and of full precision's pass over the windows."""
    batch = batch_of(windows)
    held = len(split(-(-windows // batch), batch)[1]) * (VALIDATIONS + 1)
    passes = tuning.steps * (4 if tuning.recompute else 3) + held
    tokens, all_tokens = batch * seqlen, windows * seqlen
    if tuning.scope == "block":
        return sizes.tuned * 2.0 * sizes.block * (tokens * passes + all_tokens)
    head = 2.0 * sizes.hidden * sizes.vocabulary * (tokens * (2 * tuning.steps + held) + all_tokens)
    return sizes.blocks * 2.0 * sizes.block * (tokens * passes + all_tokens) + head
