"""Learning the transforms and clips of one block, so that its quantized form answers like the original.

    min over Θ of  loss(F(W, X), F(Q(T(W; Θ)), X̂))

with F the block as a function of its weights, X the full-precision inputs and X̂ those behind the quantized prefix.
The weights that are trained are those that are deployed: `Learner.materialize` is the only path to them, and the
solver that follows gets the grid of the same formula.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.actquant import ONLINE, ActSpec, instrumented
from quant.blocks.stream import BlockStream
from quant.core.errors import InputError
from quant.core.rounding import RoundTo
from quant.core.types import Grid, QuantSpec
from quant.learn import affine as seams
from quant.learn.clip import clip_logits, clipped_grid, clipped_scale_zero, quantize_through
from quant.learn.config import Learning
from quant.learn.transforms import (
    InputRange,
    Parameters,
    dominance,
    floored_factors,
    transforms_for,
)

log = logging.getLogger(__name__)
COMPENSATED_FIRST, COMPENSATED_LAST, COMPENSATION_LR = 3, 4, 1e-2
Progress = Callable[[int, int, float, float], None]  # epoch, epochs, loss now, loss at the start


@dataclass(frozen=True)
class LearnedBlock:
    """A block after learning, before its weights are rounded.

    weights: transformed, in the arithmetic's dtype. targets: float32 weights of the linears for the solver. grids:
    theirs; empty where weights stay in full precision. tensors: what a checkpoint holds otherwise than the original,
    besides the solved linears. parameters: what was learned. log: losses and events, numbers of matrices behind norms,
    and the seams that are shifted besides scaled.
    """

    weights: Weights
    targets: Weights
    grids: Mapping[str, Grid]
    tensors: Weights
    parameters: Parameters
    log: Mapping[str, Any]


class Learner:
    """One block's trainable form. ``start`` continues from learned parameters instead of the usual start.

    Raises InputError if ``start`` does not fit.
    """

    def __init__(
        self,
        model: LazyModel,
        index: int,
        weights: Weights,
        spec: QuantSpec | None,
        act: ActSpec,
        learning: Learning,
        ranges: Mapping[str, InputRange],
        start: Parameters | None = None,
    ) -> None:
        self.model, self.index, self.spec, self.act, self.learning = model, index, spec, act, learning
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.weights = {k: t.to(wide) if t.is_floating_point() else t for k, t in weights.items()}
        self.linears = [name for group in model.groups for name in group]
        self.transforms = transforms_for(model.family, model.config, weights, learning.transform)
        parameters: Parameters = {}
        for transform in self.transforms:
            parameters |= transform.initial(weights, ranges)
        if learning.clip and spec is not None:
            for name in self.linears:
                lower, upper = clip_logits(weights[f"{name}.weight"], spec)
                parameters |= {f"clip.{name}.lower": lower, f"clip.{name}.upper": upper}
        if learning.compensation and self._compensates():
            n_out, n_in = weights[f"{self.linears[-1]}.weight"].shape
            device = weights[f"{self.linears[-1]}.weight"].device
            parameters[f"rank1.{self.linears[-1]}.left"] = torch.zeros(n_out, 1, device=device)
            parameters[f"rank1.{self.linears[-1]}.right"] = torch.ones(1, n_in, device=device)
        self.resumed = start is not None
        if start is not None:
            parameters = self._checked(parameters, start)
        self.parameters = {k: p.to(wide).requires_grad_() for k, p in parameters.items()}
        # Steps of single rows of matrices that were taken back; counted on the device, read when the block is done.
        self.rejected = torch.zeros((), dtype=torch.int64, device=next(iter(weights.values())).device)

    def _compensates(self) -> bool:
        return self.index < COMPENSATED_FIRST or self.index >= len(self.model.blocks) - COMPENSATED_LAST

    def _checked(self, own: Parameters, start: Parameters) -> Parameters:
        """Learned parameters as raw ones. Raises InputError where names or shapes differ."""
        wrong = [k for k in {*own, *start} if k not in own or k not in start or own[k].shape != start[k].shape]
        if wrong:
            raise InputError(
                f"--resume: block {self.index} has other learned parameters ({sorted(wrong)[0]}, ...); "
                "give the same --lwc, --let, --use_matrix, --use_ln_matrix, bits and groups as the run that learned them"
            )
        raw = {k: p.to(own[k].device) for k, p in start.items()}
        for name in (f"{t.name}.matrix" for t in self.transforms if f"{t.name}.matrix" in raw):
            diagonal = torch.diag_embed(raw[name].diagonal(dim1=-2, dim2=-1))
            raw[name] = diagonal + (raw[name] - diagonal) / self.learning.transform.stability
        return raw

    def effective(self, parameters: Mapping[str, Tensor], progress: float) -> Parameters:
        """Parameters with the gradual masks in them: what is saved, and all that the weights depend on."""
        found = dict(parameters)
        for transform in self.transforms:
            found = transform.masked(found, 1.0 if self.resumed else progress)
        return found

    def transformed(self, effective: Mapping[str, Tensor]) -> Weights:
        """The block's weights with all transforms in them, not quantized, float32 (or float64)."""
        weights = self.weights
        for transform in self.transforms:
            weights = transform.apply(weights, effective)
        last = self.linears[-1]
        if f"rank1.{last}.left" in effective:
            added = effective[f"rank1.{last}.left"] * effective[f"rank1.{last}.right"]
            weights = {**weights, f"{last}.weight": weights[f"{last}.weight"] + added}
        return weights

    def clip(self, effective: Mapping[str, Tensor], linear: str) -> tuple[Tensor | None, Tensor | None]:
        """Logits of both ends of a linear's range."""
        return effective.get(f"clip.{linear}.lower"), effective.get(f"clip.{linear}.upper")

    def materialize(self, effective: Mapping[str, Tensor]) -> Weights:
        """The weights that the block is trained with and deployed with, in the arithmetic's dtype."""
        found = {}
        for name, tensor in self.transformed(effective).items():
            linear, _, part = name.rpartition(".")
            if self.spec is not None and part == "weight" and linear in self.linears:
                scale, zero = clipped_scale_zero(tensor, self.spec, *self.clip(effective, linear))
                tensor = quantize_through(tensor, scale, zero, self.spec.qmax)
            found[name] = self._stored(name, tensor)
        return found

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """As a checkpoint holds it."""
        if not tensor.is_floating_point():
            return tensor
        kept = self._kept_dtype(name)
        if kept != tensor.dtype:
            tensor = RoundTo.apply(tensor, kept)
        return tensor.to(self.model.dtype)

    def _kept_dtype(self, name: str) -> torch.dtype:
        """In which a checkpoint holds an entry of floating-point numbers that no solver rounds."""
        return seams.ONLINE_DTYPE if name.endswith(ONLINE) else self.model.storage_dtype

    @torch.no_grad()
    def finish(self, effective: Parameters, record: Mapping[str, Any]) -> LearnedBlock:
        """The block with these parameters, for the solver."""
        transformed = self.transformed(effective)
        solved = {f"{name}.weight" for name in self.linears} if self.spec is not None else set()
        changed = {k: t for k, t in transformed.items() if k not in solved and t is not self.weights.get(k)}
        keep = {k: t.to(self._kept_dtype(k)) for k, t in changed.items()}
        online = sum(t.numel() for k, t in keep.items() if k.endswith(ONLINE))
        grids = {}
        if self.spec is not None:
            for name in self.linears:
                weight = transformed[f"{name}.weight"]
                grids[name] = clipped_grid(weight, self.spec, *self.clip(effective, name))
        return LearnedBlock(
            weights={k: self._stored(k, t) for k, t in transformed.items()},
            targets={name: transformed[f"{name}.weight"].float() for name in self.linears},
            grids=grids,
            tensors=keep,
            parameters={k: p.detach().clone() for k, p in effective.items()},
            log={**record, "online_parameters": online, "shifted": [t.name for t in self.transforms if t.shift]},
        )


class _Seen(Exception):  # noqa: N818  (control flow, not an error)
    """Carries attention logits out of a call that need not go on."""


class BlockLoss:
    """The papers' losses of one block's outputs, batch by batch.

    targets: hidden states behind the full-precision block, one store for each term. teacher: the full-precision stream
    in front of the block, where attention is in the loss.
    """

    def __init__(
        self, learner: Learner, original: Weights, targets: list[Any], teacher: BlockStream | None = None
    ) -> None:
        self.learner, self.original, self.targets, self.teacher = learner, original, targets, teacher

    def __call__(self, stream: BlockStream, weights: Weights, rows: slice, arguments: list) -> Tensor:
        """Mean loss of the samples ``rows``, a float32 scalar on the device."""
        learner = self.learner
        logits: list[Tensor] = []
        block = learner.model.blocks[learner.index]
        watch = logits.append if self.teacher is not None else None
        with instrumented(block, weights, learner.act, watch) as own:
            out = stream.call(learner.index, own, rows, arguments).float()
        loss = torch.zeros((), device=out.device)
        for store in self.targets:
            target = store[rows].float()
            loss = loss + F.mse_loss(out, target)
            if learner.learning.distribution:
                loss = loss - F.cosine_similarity(out, target, dim=-1).mean().abs().log()
        if self.teacher is not None:
            loss = loss + symmetric_kl(self._teacher_logits(rows, arguments), logits[0])
        return loss

    @torch.no_grad()
    def _teacher_logits(self, rows: slice, arguments: list) -> Tensor:
        """Attention logits of the full-precision block; its call ends there."""
        assert self.teacher is not None
        block = self.learner.model.blocks[self.learner.index]

        def stop(logits: Tensor) -> None:
            raise _Seen(logits)

        try:
            with instrumented(block, self.original, None, stop) as own:
                self.teacher.call(self.learner.index, own, rows, arguments)
        except _Seen as seen:
            logits: Tensor = seen.args[0]
            return logits
        raise AssertionError("the block has no attention")

    @torch.no_grad()
    def over_all(self, stream: BlockStream, effective: Parameters) -> float:
        """Mean loss over all samples."""
        weights = self.learner.materialize(effective)
        total, n = torch.zeros((), device=stream.device, dtype=torch.float64), stream.tokens.shape[0]
        for rows, arguments in zip(stream.rows, stream.arguments, strict=True):
            total += self(stream, weights, rows, arguments).double() * (rows.stop - rows.start)
        return float(total / n)


def symmetric_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p, q) + KL(q, p) of the attention probabilities of logits [..., T, T], mean over everything but the keys.

    Gradients reach ``logits`` alone. Masked entries must be finite (the dtype's lowest number, as the library has it).
    """
    return SymmetricKL.apply(reference.float(), logits.float())


class SymmetricKL(torch.autograd.Function):
    """Σ (p - q)(log p - log q) over the keys, mean over the rest: the largest tensors of a step, so passed few times.

    With u = q (log q - log p) + q - p, the gradient is (u - q Σ u) divided by the number of rows.
    """

    @staticmethod
    def forward(ctx: Any, reference: Tensor, logits: Tensor) -> Tensor:
        """The mean; keeps the gradient."""
        log_p, log_q = torch.log_softmax(reference, -1), torch.log_softmax(logits, -1)
        q, rows = log_q.exp(), logits.shape[:-1].numel()
        ratio = log_q.sub_(log_p)
        difference = log_p.exp_().neg_().add_(q)
        loss = torch.dot(difference.view(-1), ratio.view(-1)) / rows
        gradient = difference.addcmul_(ratio, q)
        gradient.addcmul_(q, gradient.sum(-1, keepdim=True), value=-1)
        ctx.save_for_backward(gradient.div_(rows))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """Of the logits."""
        (kept,) = ctx.saved_tensors
        return None, gradient * kept


def learn_block(
    full: BlockStream,
    quantized: BlockStream,
    training: BlockStream,
    index: int,
    weights: Weights,
    spec: QuantSpec | None,
    act: ActSpec,
    learning: Learning,
    *,
    exact: Weights | None = None,
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
    teacher = full.fork() if learning.attention else None
    measured = {group[0]: InputRange() for group in full.model.groups} if learning.ranges and ranges is None else {}
    full.run(index, weights, advance=True, observe={name: span.update for name, span in measured.items()})
    if measured:
        ranges = {name: measured[group[0]] for group in full.model.groups for name in group}
    targets = [full.hidden]
    if learning.augmented:
        also = quantized.fork()
        also.run(index, weights, advance=True)
        targets.append(also.hidden)
    learner = Learner(full.model, index, exact or weights, spec, act, learning, ranges or {}, start)
    loss = BlockLoss(learner, weights, targets, teacher)
    return train(learner, loss, quantized, training, progress)


def train(
    learner: Learner, loss: BlockLoss, stream: BlockStream, training: BlockStream, progress: Progress
) -> LearnedBlock:
    """AdamW over the epochs; the best iterate at the end of an epoch is kept.

    An epoch that ends in a loss or in parameters that are not finite is undone: the best iterate so far comes back,
    the rates are halved, and the record says so. The host reads the device once an epoch.
    """
    learning, raw = learner.learning, learner.parameters
    best = {k: p.detach().clone() for k, p in learner.effective(raw, 0.0).items()}
    saved = {k: p.detach().clone() for k, p in raw.items()}
    first = lowest = loss.over_all(stream, best)
    if not math.isfinite(first):
        raise InputError(
            f"block {learner.index}: the loss is not finite before training; check the checkpoint, "
            "or use --dtype float32"
        )
    record: dict[str, Any] = {"loss_start": first, "epochs": 0, "losses": [], "events": []}
    if not raw:  # a block that has nothing to learn, as with shifts alone and no biases
        return learner.finish(best, record | {"loss_end": first})
    optimizer, stale, rate = _optimizer(learner, 1.0), 0, 1.0
    for epoch in range(learning.epochs):
        opened = epoch / (learning.epochs - 1) if learning.epochs > 1 else 1.0
        _one_epoch(learner, loss, training, optimizer, opened)
        effective = {k: p.detach() for k, p in learner.effective(raw, opened).items()}
        now = loss.over_all(stream, effective)
        record["epochs"] = epoch + 1
        record["losses"].append(now if math.isfinite(now) else None)
        progress(epoch + 1, learning.epochs, now, first)
        if not math.isfinite(now):
            rate /= 2
            record["events"].append(f"epoch {epoch + 1}: loss not finite, rolled back, rates x {rate:g}")
            log.warning(
                "block %d, epoch %d: the loss is not finite; rolled back, rates halved", learner.index, epoch + 1
            )
            for k, p in raw.items():
                p.data.copy_(saved[k])
            optimizer = _optimizer(learner, rate)
            continue
        if now < lowest:
            lowest, stale = now, 0
            best = {k: p.clone() for k, p in effective.items()}
            saved = {k: p.detach().clone() for k, p in raw.items()}
        else:
            stale += 1
        if learning.patience and stale >= learning.patience:
            record["events"].append(f"stopped after epoch {epoch + 1}: no better loss for {stale} epochs")
            break
    return learner.finish(best, record | _invertibility(learner, best) | {"loss_end": lowest})


@torch.no_grad()
def _invertibility(learner: Learner, effective: Parameters) -> dict[str, Any]:
    """How far the matrices are from being singular: rows' smallest dominance and how many of their steps were taken
    back; of the complex factors of RoPE-tied matrices the smallest |a + bi|."""
    found: dict[str, Any] = {}
    margins = [float(dominance(p).min()) for k, p in effective.items() if k.endswith(".matrix")]
    if margins:
        found |= {"smallest_dominance": min(margins), "rejected_rows": int(learner.rejected)}
    sizes = [
        float(floored_factors(effective[f"{t.name}.real"], effective[f"{t.name}.imaginary"]).norm(dim=0).min())
        for t in learner.transforms
        if f"{t.name}.real" in effective
    ]
    return found | ({"smallest_factor": min(sizes)} if sizes else {})


def _optimizer(learner: Learner, rate: float) -> torch.optim.Optimizer:
    """AdamW with the papers' rates by kind of parameter, times ``rate``."""
    learning = learner.learning
    rates = {"clip": learning.lwc_lr, "rank1": COMPENSATION_LR}
    by_rate: dict[float, list[Tensor]] = {}
    for name, parameter in learner.parameters.items():
        by_rate.setdefault(rates.get(name.split(".")[0], learning.let_lr), []).append(parameter)
    groups = [{"params": tensors, "lr": lr * rate} for lr, tensors in by_rate.items()]
    return torch.optim.AdamW(groups, weight_decay=learning.weight_decay, fused=True)


def _one_epoch(
    learner: Learner, loss: BlockLoss, training: BlockStream, optimizer: torch.optim.Optimizer, opened: float
) -> None:
    """One step for every batch, in order."""
    raw = learner.parameters
    matrices = [f"{t.name}.matrix" for t in learner.transforms if f"{t.name}.matrix" in raw]
    for rows, arguments in zip(training.rows, training.arguments, strict=True):
        weights = learner.materialize(learner.effective(raw, opened))
        optimizer.zero_grad(set_to_none=True)
        loss(training, weights, rows, arguments).backward()
        before = {name: raw[name].detach().clone() for name in matrices}
        optimizer.step()
        _keep_invertible(learner, before, opened)


@torch.no_grad()
def _keep_invertible(learner: Learner, before: Parameters, opened: float) -> None:
    """Take back the step of every row of a matrix that would lose strict diagonal dominance."""
    if not before:
        return
    effective = learner.effective(learner.parameters, opened)
    for name, old in before.items():
        holds = (dominance(effective[name]) > 0).unsqueeze(-1)
        learner.parameters[name].copy_(torch.where(holds, learner.parameters[name], old))
        learner.rejected += (~holds).sum()
