"""Training: AdamW on the parameters of one block, the best iterate kept, epochs that fail taken back."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.errors import InputError
from quant.core.types import QuantSpec
from quant.learn.config import Learning
from quant.learn.learner import LearnedBlock, Learner
from quant.learn.losses import BlockLoss, watches_attention
from quant.learn.parametrization import InputRange, Parameters
from quant.learn.together import any_ranges

log = logging.getLogger(__name__)
LEAST_RATE = 1e-3  # of the rate at the start, where it falls (FlatQuant's code)
Progress = Callable[[int, int, float, float], None]  # epoch, epochs, loss now, loss at the start


def learn_block(
    full: BlockStream,
    quantized: BlockStream,
    training: BlockStream,
    index: int,
    weights: BlockWeights,
    spec: QuantSpec | None,
    act: ActSpec,
    learning: Learning,
    *,
    exact: BlockWeights | None = None,
    ranges: Mapping[str, InputRange] | None = None,
    start: Parameters | None = None,
    progress: Progress = lambda epoch, epochs, now, first: None,
) -> LearnedBlock:
    """Learn block ``index``; ``full`` moves on behind it, ``quantized`` stays in front of it.

    training: ``quantized`` in batches of ``learning.batch``. exact: the weights as the checkpoint holds them, where the
    arithmetic's dtype holds less (half precision of another kind); parameters act on these. ranges: of the linears'
    inputs, measured here if not given. start: learned parameters to continue from.
    Raises InputError, naming the block, where the loss is not finite at the start.
    """
    teacher = full.fork() if watches_attention(learning) else None
    measured = {group[0]: InputRange() for group in full.model.groups} if learning.ranges and ranges is None else {}
    full.run(index, weights, advance=True, observe={name: span.update for name, span in measured.items()})
    if measured:
        for span in measured.values():
            span.join(len(full.tokens), learning.batch // ranks.size())
        ranges = {name: measured[group[0]] for group in full.model.groups for name in group}
    targets = [full.hidden]
    if learning.augmented:
        also = quantized.fork()
        also.run(index, weights, advance=True)
        targets.append(also.hidden)
    learner = Learner(full.model, index, exact or weights, spec, act, learning, ranges or {}, start)
    loss = BlockLoss(learner, weights, targets, teacher)
    return train(learner, loss, quantized, training, progress)


def learned_before(
    model: LazyModel,
    index: int,
    exact: BlockWeights,
    spec: QuantSpec | None,
    act: ActSpec,
    learning: Learning,
    parameters: Parameters,
) -> LearnedBlock:
    """Block ``index`` as `learn_block` left it with these parameters. exact: as there."""
    return Learner(model, index, exact, spec, act, learning, any_ranges(model), parameters).finish(parameters, {})


def train(
    learner: Learner, loss: BlockLoss, stream: BlockStream, training: BlockStream, progress: Progress
) -> LearnedBlock:
    """AdamW over the epochs; the best iterate at the end of an epoch is kept.

    An epoch that ends in a loss or in parameters that are not finite is undone: the best iterate so far comes back,
    the rates are halved, and the record says so. The host reads the device once an epoch.
    """
    learning, raw = learner.learning, learner.parameters
    # Two copies of the best iterate: effective parameters for the deployed block, raw ones to go back to.
    best, best_raw = _copy(learner.effective(raw, 0.0)), _copy(raw)
    first = lowest = loss.over_all(stream, best)
    if not math.isfinite(first):
        raise InputError(
            f"block {learner.index}: the loss is not finite before training; check the checkpoint, "
            "or use --dtype float32"
        )
    record: dict[str, Any] = {"loss_start": first, "epochs": 0, "losses": [], "events": []}
    if not raw:  # a block that has nothing to learn, as with shifts alone and no biases
        return learner.finish(best, record | {"loss_end": first})
    optimizer, stale, rate = optimizer_for(learner, 1.0), 0, 1.0
    for epoch in range(learning.epochs):
        opened = epoch / (learning.epochs - 1) if learning.epochs > 1 else 1.0
        train_epoch(learner, loss, training, optimizer, opened, rate_shares(learning, epoch, len(training.rows)))
        effective = _copy(learner.effective(raw, opened))
        now = loss.over_all(stream, effective)
        record["epochs"] = epoch + 1
        record["losses"].append(now if math.isfinite(now) else None)
        progress(epoch + 1, learning.epochs, now, first)
        # Roll back: AdamW's moments are not finite either, so that a new one starts from the best iterate.
        if not math.isfinite(now):
            rate /= 2
            record["events"].append(f"epoch {epoch + 1}: loss not finite, rolled back, rates x {rate:g}")
            log.warning(
                "block %d, epoch %d: the loss is not finite; rolled back, rates halved", learner.index, epoch + 1
            )
            for k, p in raw.items():
                p.data.copy_(best_raw[k])
            optimizer = optimizer_for(learner, rate)
            continue
        if now < lowest:
            lowest, stale, best, best_raw = now, 0, effective, _copy(raw)
        else:
            stale += 1
        if learning.patience and stale >= learning.patience:
            record["events"].append(f"stopped after epoch {epoch + 1}: no better loss for {stale} epochs")
            break
    return learner.finish(best, record | learner.facts(best) | {"loss_end": lowest})


def _copy(parameters: Parameters) -> Parameters:
    return {k: p.detach().clone() for k, p in parameters.items()}


def optimizer_for(learner: Learner, factor: float) -> torch.optim.Optimizer:
    """AdamW with the rates of the parametrizations, times ``factor``."""
    by_rate: dict[float, list[Tensor]] = {}
    for part, own in learner.parts(learner.parameters):
        by_rate.setdefault(part.rate, []).extend(own.values())
    groups = [{"params": tensors, "lr": rate * factor} for rate, tensors in by_rate.items()]
    return torch.optim.AdamW(groups, weight_decay=learner.learning.weight_decay, fused=True)


def rate_shares(learning: Learning, epoch: int, batches: int) -> list[float] | None:
    """Of the rates, at every step of an epoch: a cosine from 1 to LEAST_RATE over all of them; None where they stay."""
    if not learning.decay:
        return None
    turns = [(epoch + batch / batches) / learning.epochs for batch in range(batches)]
    return [LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * turn)) for turn in turns]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Put the mean of the gradients of all processes, whose batches are of equal size, in the place of this one's."""
    if ranks.size() == 1 or not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    together = ranks.all_sum_(torch.cat([g.flatten() for g in gradients])) / ranks.size()
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train_epoch(
    learner: Learner,
    loss: BlockLoss,
    training: BlockStream,
    optimizer: torch.optim.Optimizer,
    opened: float,
    shares: Sequence[float] | None = None,
) -> None:
    """One step for every batch, in order, with masks opened that far. shares: of the optimizer's rates, by batch."""
    full = [group["lr"] for group in optimizer.param_groups]
    for batch, (rows, arguments) in enumerate(zip(training.rows, training.arguments, strict=True)):
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate if shares is None else rate * shares[batch]
        weights = learner.materialize(learner.effective(learner.parameters, opened))
        optimizer.zero_grad(set_to_none=True)
        loss(training, weights, rows, arguments).backward()
        average_gradients([p for p in learner.parameters.values() if p.grad is not None])
        before = learner.before_step()
        optimizer.step()
        learner.after_step(before, opened)
    for group, rate in zip(optimizer.param_groups, full, strict=True):
        group["lr"] = rate
