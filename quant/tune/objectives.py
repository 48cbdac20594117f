"""What solved codes are tuned for: the output of a block, or the logits of the model.

Block: ‖F(X̂; Ŵ) - F(X; W)‖² with the inputs X̂ that the quantized model gives the block and the full-precision X; of every
batch the largest errors do not count, as in AutoRound's second version (arXiv 2512.04746). Model: the mean over positions
of KL(p ‖ p̂) between what full precision and the quantized model say comes next, as in EfficientQAT's end-to-end stage
(arXiv 2407.11062), with the codes free as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import functional_call

from models.load import LazyModel, Weights
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.stream import Activations, BlockStream
from quant.blocks.weights import BlockWeights
from quant.tune.block import TunedBlock
from quant.tune.codes import Parameters
from quant.tune.config import Tuning, split
from quant.tune.optimize import Objective


def trimmed_squared_error(out: Tensor, target: Tensor, drop: float) -> Tensor:
    """Mean squared difference, float32, over all but the share ``drop`` of the largest."""
    errors = (out.float() - target.float()).square().flatten()
    dropped = int(errors.numel() * drop)
    if not dropped:
        return errors.mean()
    largest = errors.topk(dropped, sorted=False).values
    return (errors.sum() - largest.sum()) / (errors.numel() - dropped)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Mean over positions of KL(p ‖ q), from log-probabilities [..., vocabulary]."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (log_q.numel() // log_q.shape[-1])


def block_objective(
    block: TunedBlock, training: BlockStream, targets: Activations, act: ActSpec, tuning: Tuning
) -> Objective:
    """The loss of one block. training: in front of it, in batches of a step; targets: full precision's outputs."""
    rows, index = training.rows, block.index

    def loss(parameters: Parameters, batch: int) -> Tensor:
        with instrument(training.model.blocks[index], block.weights_at(parameters), act) as own:
            out = training.call(index, own, rows[batch], training.arguments[batch])
        return trimmed_squared_error(out, targets[rows[batch]], tuning.drop)

    return _objective(loss, rows)


def model_objective(
    model: LazyModel,
    blocks: Sequence[TunedBlock],
    rest: BlockWeights,
    outside: Weights,
    full: BlockStream,
    act: ActSpec,
) -> Objective:
    """The loss of the whole model. full: full precision behind the last block, in batches of a step. rest: weights of the
    blocks that are not tuned, by ``<index>.<name>``."""
    rows = full.rows

    def loss(parameters: Parameters, batch: int) -> Tensor:
        weights = rest | weights_of(blocks, parameters)
        log_q = torch.log_softmax(logits_of(model, weights, outside, full.tokens[rows[batch]], act), -1)
        with torch.no_grad():
            log_p = torch.log_softmax(full.logits(rows[batch], outside).clone(), -1)
        return divergence(log_q, log_p)

    return _objective(loss, rows)


def weights_of(blocks: Sequence[TunedBlock], parameters: Mapping[str, Tensor]) -> BlockWeights:
    """Weights of several blocks, by ``<index>.<name>``; their parameters are under the same prefix."""
    weights = BlockWeights()
    for block in blocks:
        prefix = f"{block.index}."
        own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
        weights |= block.weights_at(own).within(block.index)
    return weights


def logits_of(model: LazyModel, weights: BlockWeights, outside: Weights, ids: Tensor, act: ActSpec | None) -> Tensor:
    """Logits float32 [batch, T, vocabulary] of the whole model. weights: of its blocks, by ``<index>.<name>``."""
    device = next(iter(outside.values())).device
    with instrument(model.blocks, weights, act) as own:
        named = {f"{model.family.blocks}.{name}": tensor for name, tensor in own.items()}
        out: Tensor = functional_call(
            model.module, {**outside, **named}, (ids.to(device),), {"use_cache": False}
        ).logits
    return out.float()


def _objective(loss: Callable[[Parameters, int], Tensor], rows: Sequence[slice]) -> Objective:
    trained, held = split(len(rows), rows[0].stop - rows[0].start)

    @torch.no_grad()
    def held_out(parameters: Parameters) -> float:
        losses = torch.stack(
            [loss(parameters, batch).double() * (rows[batch].stop - rows[batch].start) for batch in held]
        )
        return float(losses.sum() / sum(rows[batch].stop - rows[batch].start for batch in held))

    return Objective(loss, held_out, trained)
