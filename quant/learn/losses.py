"""The loss of a block's reconstruction: terms of its outputs and of its attention logits, added up.

A term is a function under `loss_term` or `attention_term`; `Learning.loss_terms` names those that are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.learn import attention_term, loss_term
from quant.learn.config import Learning
from quant.learn.learner import Learner
from quant.learn.parametrization import Parameters


@loss_term("reconstruction")
def squared_error(out: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference: OmniQuant's loss, and the first term of the others."""
    return F.mse_loss(out, target)


def watches_attention(learning: Learning) -> bool:
    """Whether a term needs the attention logits of the full-precision block."""
    return any(name in attention_term.entries() for name in learning.loss_terms)


class _Logits(BaseException):  # noqa: N818  (control flow, not an error)
    """Carries attention logits out of a call that need not go on."""


class BlockLoss:
    """The loss of one block's outputs, batch by batch.

    targets: hidden states that the block should answer with; terms of outputs are taken for each. teacher: the
    full-precision stream in front of the block, where attention is in the loss.
    """

    def __init__(
        self, learner: Learner, original: BlockWeights, targets: list[Any], teacher: BlockStream | None = None
    ) -> None:
        self.learner, self.original, self.targets, self.teacher = learner, original, targets, teacher
        names, of_attention = learner.learning.loss_terms, attention_term.entries()
        self.output_terms = loss_term.pick(name for name in names if name not in of_attention)
        self.attention_terms = attention_term.pick(name for name in names if name in of_attention)

    def __call__(self, stream: BlockStream, weights: BlockWeights, rows: slice, arguments: list) -> Tensor:
        """Mean loss of the samples ``rows``, a float32 scalar on the device."""
        learner = self.learner
        logits: list[Tensor] = []
        block = learner.model.blocks[learner.index]
        watch = logits.append if self.attention_terms else None
        with instrument(block, weights, learner.act, watch) as own:
            out = stream.call(learner.index, own, rows, arguments).float()  # [n, T, hidden]
        loss = torch.zeros((), device=out.device)
        for store in self.targets:
            target = store[rows].float()
            for term in self.output_terms:
                loss = loss + term(out, target)
        if self.attention_terms:
            reference = self._teacher_logits(rows, arguments)  # [n, heads, T, T]
            for term in self.attention_terms:
                loss = loss + term(logits[0], reference)
        return loss

    @torch.no_grad()
    def _teacher_logits(self, rows: slice, arguments: list) -> Tensor:
        """Attention logits of the full-precision block; its call ends there."""
        assert self.teacher is not None
        block = self.learner.model.blocks[self.learner.index]

        def stop(logits: Tensor) -> None:
            raise _Logits(logits)

        try:
            with instrument(block, self.original, None, stop) as own:
                self.teacher.call(self.learner.index, own, rows, arguments)
        except _Logits as carrier:
            logits: Tensor = carrier.args[0]
            return logits
        raise AssertionError("the block has no attention")

    @torch.no_grad()
    def over_all(self, stream: BlockStream, effective: Parameters) -> float:
        """Mean loss over all samples, those of all processes."""
        weights = self.learner.materialize(effective)
        total, n = torch.zeros((), device=stream.device, dtype=torch.float64), stream.tokens.shape[0]
        for rows, arguments in zip(stream.rows, stream.arguments, strict=True):
            total += self(stream, weights, rows, arguments).double() * (rows.stop - rows.start)
        return float(ranks.all_sum_(total)) / sum(ranks.all_told(n)) if ranks.size() > 1 else float(total / n)
