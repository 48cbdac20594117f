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

SHARE = 0.8  # of the free memory that tuning several blocks may take
STATE = {
    "position": 6,
    "offset": 9,
}  # bytes a weight: its parameter, solved code, best iterate (of a position the code)
MOMENTS = {("adam", "full"): 8, ("adam", "half"): 4, ("sign", "full"): 0, ("sign", "half"): 0}  # bytes a weight
STEP = {
    "full": 4,
    "half": 20,
}  # bytes a weight of one linear: its gradient; moments in full and what they are rounded by
GRAPH = {"position": 4, "offset": 8}  # bytes a weight, besides the weight as it is deployed, kept for gradients
WIDE = 4  # bytes a weight: of the original in float32, which offsets are added to
PER_POSITION = 40  # numbers of the hidden size that a block keeps of a token for its gradients, about
PER_LEARNED = 24  # bytes a parameter of a block that is learned: itself, transformed, rounded, and what gradients need
PER_QUANTIZED = 80  # numbers of the hidden size that it keeps of a token, about: of quantized activations too
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
    largest: int  # weights of one linear

    @classmethod
    def of(cls, model: LazyModel, tuned: int) -> Sizes:
        """Those of an open model."""
        weights = [out * n_in for out, n_in in model.linear_shapes().values()]
        block = sum(p.numel() for p in model.blocks[0].parameters())
        whole = sum(p.numel() for p in model.module.parameters())
        blocks, config = len(model.blocks), model.config
        outside = whole - block * blocks
        return cls(sum(weights), block, tuned, blocks, outside, config.hidden_size, config.vocab_size, max(weights))


def check_tuning(
    model: LazyModel, tuning: Tuning, sample: QuantizedWeight, windows: int, seqlen: int, device: torch.device
) -> None:
    """Raise InputError where tuning cannot hold the grid of ``sample``, an answer of the solver; where there are too few
    windows to hold some out; or where the whole model, or a window of several blocks, does not fit in memory."""
    LINEARS[tuning.form]("a linear", sample, sample.spec, sample.dequantize())
    tokens, free = batch_of(windows) * seqlen, env.free_bytes(device)
    sizes, size = Sizes.of(model, len(model.blocks)), model.dtype.itemsize
    need = memory(sizes, tuning, size, tokens)
    if tuning.scope != "block" and need > SHARE * free:
        less = {
            "--tune-recompute": replace(tuning, recompute=True),
            "--tune-recompute --tune-state half": replace(tuning, recompute=True, state="half"),
            **{f"--tune window:{k}": replace(tuning, scope="window", window=k) for k in (8, 4, 2) if k < sizes.blocks},
        }
        fits = (flags for flags, other in less.items() if memory(sizes, other, size, tokens) <= SHARE * free)
        name = "the whole model" if tuning.scope == "model" else f"{tuning.together(sizes.blocks)} blocks"
        raise InputError(
            f"--tune {tuning.name} holds {name} with what moves in memory, about {need / 1e9:.1f} GB of "
            f"{free / 1e9:.1f} GB that are free: use {next(fits, '--tune block')}"
        )


def recomputes(model: LazyModel, windows: int, seqlen: int, device: torch.device, flag: str = "--whole_model") -> bool:
    """Whether blocks keep their inputs alone for the backward pass when what is learned of all of them is trained together:
    where the rest does not fit. flag: that asks for it. Raises InputError where that does not fit either."""
    sizes, tokens, free = Sizes.of(model, len(model.blocks)), batch_of(windows) * seqlen, env.free_bytes(device)
    heads = model.family.heads(model.config).q[1].shape[0]
    needs = [learning_memory(sizes, tokens, heads * seqlen, model.dtype.itemsize, again) for again in (False, True)]
    if needs[1] > SHARE * free:
        raise InputError(
            f"{flag} holds the whole model with its gradients in memory, about {needs[1] / 1e9:.1f} GB of "
            f"{free / 1e9:.1f} GB that are free: leave it out"
        )
    return needs[0] > SHARE * free


def learning_memory(sizes: Sizes, tokens: int, logits: int, itemsize: int, recompute: bool) -> float:
    """Bytes on the device, about, of training what is learned of all blocks together. tokens: of a step; logits: of attention,
    a token; recompute: blocks keep their inputs alone for the backward pass."""
    through = 1 if recompute else sizes.blocks
    weights = 4 * sizes.block * sizes.blocks + (PER_LEARNED - 4) * sizes.block * through + itemsize * sizes.outside
    kept = PER_QUANTIZED * sizes.hidden * through + 3 * logits * through + recompute * sizes.blocks * sizes.hidden
    return weights + tokens * (itemsize * kept + PER_LOGIT * sizes.vocabulary)


def memory(sizes: Sizes, tuning: Tuning, itemsize: int, tokens: int) -> float:
    """Bytes on the device, about, with so many tokens in a step. itemsize: bytes of a number of the arithmetic."""
    whole = tuning.scope == "model"
    tuned = tuning.together(sizes.tuned)
    through = sizes.blocks if whole else tuned
    state = STATE[tuning.form] + MOMENTS[tuning.optimizer, tuning.state] + (WIDE if tuning.form == "offset" else 0)
    graph = GRAPH[tuning.form] + itemsize
    weights = sizes.linears * (state * tuned + graph * (1 if tuning.recompute else tuned))
    weights += STEP[tuning.state if tuning.optimizer == "adam" else "full"] * sizes.largest
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
    if tuning.scope != "model":
        again = tuning.together(sizes.tuned) > 1  # from the start of a window once more, behind tuned blocks
        return sizes.tuned * 2.0 * sizes.block * (tokens * passes + all_tokens * (1 + again))
    head = 2.0 * sizes.hidden * sizes.vocabulary * (tokens * (2 * tuning.steps + held) + all_tokens)
    return sizes.blocks * 2.0 * sizes.block * (tokens * passes + all_tokens) + head
