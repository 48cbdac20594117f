"""What solved codes are tuned for: the output of a block, or the logits of the model.

Block: ‖F(X̂; Ŵ) - F(X; W)‖² with the inputs X̂ that the quantized model gives the block and the full-precision X; of every
batch the largest errors do not count, as in AutoRound's second version (arXiv 2512.04746). Model: the mean over positions
of KL(p ‖ p̂) between what full precision and the quantized model say comes next, as in EfficientQAT's end-to-end stage
(arXiv 2407.11062), with the codes free as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from models.load import Weights
from quant.blocks.stream import Activations, BlockStream
from quant.core import env
from quant.tune.chain import Chain
from quant.tune.codes import Parameters
from quant.tune.config import Tuning, split
from quant.tune.optimize import Objective

CACHE_SHARE = 0.25  # of the free memory that full precision's probabilities may take


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


class Divergence(torch.autograd.Function):
    """`divergence` of logits float32 [n, vocabulary] for training: the gradient, (q - p) / n, is made in place with the
    value, for one backward pass. p: probabilities [n, vocabulary]; negentropy: the mean of Σ p log p over positions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor, negentropy: Tensor) -> Tensor:
        """Value; keeps the gradient."""
        log_q = torch.log_softmax(logits, -1)
        cross = torch.dot(p.flatten(), log_q.flatten()) / len(p)
        ctx.own = log_q.exp_().sub_(p)
        return negentropy - cross

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """As it was kept."""
        own: Tensor = ctx.own
        return own.mul_(gradient / len(own)), None, None


class Teacher:
    """What full precision says comes next. full: behind the last block, in batches of a step. What it says of a batch is
    kept where all of it fits into CACHE_SHARE of the free memory, and computed again where not: the numbers are the same."""

    def __init__(self, full: BlockStream, outside: Weights, vocabulary: int) -> None:
        self.full, self.outside = full, outside
        self.keeps = 4 * full.tokens.numel() * vocabulary <= CACHE_SHARE * env.free_bytes(full.device)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def log_probabilities(self, batch: int) -> Tensor:
        """[n, vocabulary], float32, n positions."""
        return torch.log_softmax(self.full.logits(self.full.rows[batch], self.outside).clone().flatten(0, 1), -1)

    @torch.no_grad()
    def probabilities(self, batch: int) -> tuple[Tensor, Tensor]:
        """[n, vocabulary], and the mean over positions of Σ p log p."""
        if batch in self.kept:
            return self.kept[batch]
        log_p = self.log_probabilities(batch)
        p = log_p.exp()
        answer = p, torch.bmm(p.unsqueeze(1), log_p.unsqueeze(2)).mean()
        if self.keeps:
            self.kept[batch] = answer
        return answer


def block_objective(chain: Chain, targets: Activations, tuning: Tuning) -> Objective:
    """The loss of the output of a block, or of the last of several. chain: in front of the first; targets: full
    precision's outputs."""
    stream = chain.training

    def loss(parameters: Parameters, batch: int) -> Tensor:
        rows = stream.rows[batch]
        return trimmed_squared_error(chain(parameters, stream.hidden[rows], batch), targets[rows], tuning.drop)

    return objective_of(loss, loss, chain)


def language_objective(chain: Chain, outside: Weights) -> Objective:
    """The cross-entropy of the tokens that come next, where the chain ends behind the last block: what AutoRound's second
    version may tune the last block for."""
    stream = chain.training

    def loss(parameters: Parameters, batch: int) -> Tensor:
        rows = stream.rows[batch]
        logits = stream.head(chain(parameters, stream.hidden[rows], batch), rows, outside).float()
        following = stream.tokens[rows][:, 1:].to(logits.device)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten())

    return objective_of(loss, loss, chain)


def model_objective(chain: Chain, full: BlockStream, outside: Weights) -> Objective:
    """The loss of the whole model. chain: all blocks, in front of the first; full: full precision behind the last block, in
    batches of a step."""
    stream = chain.training
    teacher = Teacher(full, outside, full.model.config.vocab_size)

    def logits(parameters: Parameters, batch: int) -> Tensor:
        rows = stream.rows[batch]
        return stream.head(chain(parameters, stream.hidden[rows], batch), rows, outside).float().flatten(0, 1)

    def loss(parameters: Parameters, batch: int) -> Tensor:
        value: Tensor = Divergence.apply(logits(parameters, batch), *teacher.probabilities(batch))
        return value

    def exact(parameters: Parameters, batch: int) -> Tensor:
        return divergence(torch.log_softmax(logits(parameters, batch), -1), teacher.log_probabilities(batch))

    return objective_of(loss, exact, chain)


def objective_of(
    loss: Callable[[Parameters, int], Tensor], measured: Callable[[Parameters, int], Tensor], chain: Chain
) -> Objective:
    """An objective from its loss of a batch, as it is trained on and as it is measured on held-out windows."""
    rows = chain.training.rows
    trained, held = split(len(rows), rows[0].stop - rows[0].start)

    @torch.no_grad()
    def held_out(parameters: Parameters) -> float:
        losses = torch.stack(
            [measured(parameters, batch).double() * (rows[batch].stop - rows[batch].start) for batch in held]
        )
        return float(losses.sum() / sum(rows[batch].stop - rows[batch].start for batch in held))

    return Objective(loss, held_out, trained, chain.settled)
