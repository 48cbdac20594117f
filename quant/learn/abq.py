"""ABQ-LLM: OmniQuant with scales into the down projections, compensation, other losses, and five levels at 2 bits.

- LET also between up and down projections, where the activation function lets a scale through.
- Compensation: W + a bᵀ on the down projections of the first 3 and last 4 blocks, a = 0 and b = 1 at the start.
- Distribution correction: the log-cosine of outputs and targets, on both streams, beside their squared difference.
- Attention awareness: the symmetric KL divergence of the attention probabilities. (The released code takes a
  softmax of probabilities averaged over heads, which leaves almost no signal.)
- Bit balance: 2^bits + 1 levels at 1 and 2 bits. Five levels are 2.32 bits of entropy and 3 stored bits.
  (Zeng et al., AAAI 2025)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.blocks.linears import LinearRef
from quant.blocks.weights import BlockWeights
from quant.learn import attention_term, ingredient, loss_term, recipe
from quant.learn.config import Learning
from quant.learn.omniquant import omniquant
from quant.learn.parametrization import Block, InputRange, Parameters, Parametrization

COMPENSATED_FIRST, COMPENSATED_LAST, COMPENSATION_LR = 3, 4, 1e-2


@recipe("abq")
def abq(learning: Learning, wbits: int, abits: int) -> Learning:
    """The row of the paper."""
    row = omniquant(learning, wbits, abits)
    if row.transform.let and not learning.transform.kinds:
        row = replace(row, transform=replace(row.transform, kinds=(*row.transform.kinds, "mul")))
    return replace(row, compensation=True, augmented=True, distribution=True, attention=True)


def balanced_levels(wbits: int, balance: str) -> int | None:
    """Levels of the grid under ``--bit-balance`` on, off or auto (on at 1 and 2 bits); None for 2^wbits."""
    return 2**wbits + 1 if balance == "on" or (balance == "auto" and wbits <= 2) else None


def is_compensated(index: int, n_blocks: int) -> bool:
    """Whether a block is among the first or last, which get a compensation."""
    return index < COMPENSATED_FIRST or index >= n_blocks - COMPENSATED_LAST


@ingredient("compensation")
def compensation(block: Block) -> list[Compensation]:
    """One for the down projection, which is the last linear."""
    if not is_compensated(block.index, len(block.model.blocks)):
        return []
    return [Compensation(block.linears[-1])]


class Compensation(Parametrization):
    """W + a bᵀ for the weight [out, in] of a linear: ``left`` a [out, 1], ``right`` b [1, in]."""

    rate = COMPENSATION_LR

    def __init__(self, linear: str) -> None:
        self.name, self.linear = f"rank1.{linear}", LinearRef.of_module(linear)

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """Nothing added, and a gradient for a."""
        weight = self.linear.weight(weights.parameters)
        (n_out, n_in), device = weight.shape, weight.device
        return {"left": torch.zeros(n_out, 1, device=device), "right": torch.ones(1, n_in, device=device)}

    def apply(self, weights: BlockWeights, parameters: Parameters) -> BlockWeights:
        """The sum, in place of the weight."""
        weight = self.linear.weight(weights.parameters) + parameters["left"] * parameters["right"]
        return replace(weights, parameters=self.linear.replace(weights.parameters, weight))


@loss_term("distribution")
def log_cosine(out: Tensor, target: Tensor) -> Tensor:
    """-log |mean cosine of outputs and targets [..., hidden]|."""
    return -F.cosine_similarity(out, target, dim=-1).mean().abs().log()


@attention_term("attention")
def symmetric_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p, q) + KL(q, p) of the attention probabilities of logits [..., T, T], mean over everything but the keys.

    Gradients reach ``logits`` alone. Masked entries must be finite (the dtype's lowest number, as the library has it).
    """
    return SymmetricKL.apply(logits.float(), reference.float())


class SymmetricKL(torch.autograd.Function):
    """Σ (p - q)(log p - log q) over the keys, mean over the rest: the largest tensors of a step, so passed few times.

    With u = q (log q - log p) + q - p, the gradient is (u - q Σ u) divided by the number of rows.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        """The mean; keeps the gradient."""
        log_p, log_q = torch.log_softmax(reference, -1), torch.log_softmax(logits, -1)
        # Not exp(log q): of masked entries, far below what underflows, it takes ten times as long as of others.
        q, rows = torch.softmax(logits, -1), logits.shape[:-1].numel()
        # In place from here on: ``log_q`` becomes log q - log p, p becomes q - p, then u, then the gradient.
        ratio = log_q.sub_(log_p)
        difference = torch.softmax(reference, -1).neg_().add_(q)
        loss = torch.dot(difference.view(-1), ratio.view(-1)) / rows
        gradient = difference.addcmul_(ratio, q)
        gradient.addcmul_(q, gradient.sum(-1, keepdim=True), value=-1)
        ctx.save_for_backward(gradient.div_(rows))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The kept gradient reaches the logits."""
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None
