"""One backward pass of the full-precision model over windows of tokens, with one block in memory at a time.

ℓ is the sum over all positions of -log p(label), of labels that the model's own softmax draws (then E[g gᵀ] is the Fisher
information, which is the Hessian of the divergence from the model) or of the tokens that follow in the text. Forward, the
hidden states in front of every block are kept, where the stream keeps its own. Then, from the last block to the first, a
block is run once more from them, and takes the gradient of ℓ behind it to the one in front of it; whoever watches a linear
of it sees the inputs x and the gradients g = ∂ℓ/∂y of its outputs on the way.

Held at a time: hidden states of all blocks and gradients of every draw, the weights of a block, and its graph for one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.load import Weights
from quant.blocks.instrument import instrument
from quant.blocks.stream import Activations, BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.names import SAMPLED_LABELS

HEAD_ELEMENTS = 1 << 26  # logits computed at a time; they are held about five times, in float32
See = Callable[[slice, int, Tensor, Tensor], None]  # windows, draw, inputs [b, T, in], gradients [b, T, out] of outputs
Progress = Callable[[int, int], None]  # passes of a block, all passes


class Watcher(Protocol):
    """Who sees gradients. They come block by block from the last to the first, in batches of the stream, and of every batch
    draw after draw; inputs in the arithmetic's dtype, gradients in float32, or float64 where the arithmetic is."""

    def begin(self, index: int, weights: BlockWeights, stream: BlockStream) -> Mapping[str, See]:
        """What is to see the linears of block ``index``, by name; linears that are not named cost nothing. stream: full
        precision in front of that block, where it has to stay."""

    def end(self, index: int) -> None:
        """All of block ``index`` was seen."""


@dataclass(frozen=True)
class Labels:
    """What the model should have said. kind: ``sampled`` from its own softmax, ``draws`` times, by the seed and whatever the
    batches; or ``data``, the next token of the text (the last position has none then)."""

    kind: str = SAMPLED_LABELS
    draws: int = 2
    seed: int = 0

    @property
    def count(self) -> int:
        """How often ℓ is differentiated."""
        return self.draws if self.kind == SAMPLED_LABELS else 1

    def states_held(self, n_blocks: int) -> int:
        """Sets of hidden states that the pass holds: in front of every block and behind the last, and gradients."""
        return n_blocks + 1 + self.count

    def chances(self, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1), float32 [draws, n, T], which decide what is sampled."""
        return torch.rand((self.count, *shape), generator=torch.Generator().manual_seed(self.seed))

    def loss(self, log_p: Tensor, ids: Tensor, chance: Tensor) -> Tensor:
        """ℓ of one draw, from log-probabilities [b, T, vocabulary] at tokens [b, T]."""
        if self.kind == SAMPLED_LABELS:
            return -log_p.gather(-1, sample(log_p.detach(), chance)[..., None]).sum()
        return -log_p[:, :-1].gather(-1, ids[:, 1:, None]).sum()


def sample(log_p: Tensor, chance: Tensor) -> Tensor:
    """A label for every position, int64: where the cumulated probabilities [..., vocabulary] pass the chance [...]."""
    cumulated = log_p.exp().cumsum(-1)
    passed = chance.to(cumulated)[..., None] * cumulated[..., -1:]
    return torch.searchsorted(cumulated, passed, right=True).squeeze(-1).clamp_(max=log_p.shape[-1] - 1)


def backward(
    stream: BlockStream, labels: Labels, watchers: Sequence[Watcher], progress: Progress = lambda done, total: None
) -> None:
    """Show the gradients of the model's linears to the watchers. stream: full precision in front of the first block, where it
    stays. Raises InputError, naming the block, where a hidden state or gradient is not finite."""
    model, n_blocks = stream.model, len(stream.model.blocks)
    states = [stream]
    for index in range(n_blocks):
        following = states[-1].fork()
        following.run(index, BlockWeights.read(model, index, stream.device), advance=True)
        states.append(following)
        progress(index + 1, 2 * n_blocks)
    gradients = _head(states.pop(), labels)
    for index in reversed(range(n_blocks)):
        weights = BlockWeights.read(model, index, stream.device)
        front = states.pop()
        _block(front, index, weights, gradients, [watcher.begin(index, weights, front) for watcher in watchers])
        for watcher in watchers:
            watcher.end(index)
        progress(2 * n_blocks - index, 2 * n_blocks)


class _Gradients:
    """Gradients of ℓ at hidden states [n, T, d], for every draw: g = 2^e · what is stored, with one e for each batch and a
    largest stored entry in [1, 2), so that float16 neither loses nor overflows them."""

    def __init__(self, stream: BlockStream, draws: int) -> None:
        self._stores: list[Activations] = [stream.new_store() for _ in range(draws)]
        self._exponents: list[dict[int, int]] = [{} for _ in range(draws)]

    @property
    def draws(self) -> range:
        """Their numbers."""
        return range(len(self._stores))

    def read(self, draw: int, rows: slice) -> tuple[Tensor, float]:
        """What is stored of a batch, and 2^e."""
        return self._stores[draw][rows], 2.0 ** self._exponents[draw][rows.start]

    def write(self, draw: int, rows: slice, stored: Tensor, scale: float, where: str) -> None:
        """Keep scale · stored for a batch. Raises InputError, naming where, if it is not finite."""
        largest = float(stored.abs().amax())
        if not math.isfinite(largest):
            raise InputError(f"{where}: gradients are not finite in {stored.dtype}; use --dtype float32 or bfloat16")
        exponent = math.frexp(largest)[1] - 1 if largest else 0
        self._stores[draw][rows] = stored * 2.0**-exponent
        self._exponents[draw][rows.start] = exponent + round(math.log2(scale))


def _head(stream: BlockStream, labels: Labels) -> _Gradients:
    """The gradients behind the last block. stream: there."""
    n, length = stream.tokens.shape
    outside: Weights = stream.model.outside_weights(stream.device)
    gradients, chances = _Gradients(stream, labels.count), labels.chances((n, length))
    step = max(1, HEAD_ELEMENTS // (length * stream.model.config.vocab_size))
    for rows in stream.rows:
        parts = [slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)]
        of_parts = [_head_gradients(stream, part, outside, labels, chances[:, part]) for part in parts]
        for draw in gradients.draws:
            gradients.write(draw, rows, torch.cat([own[draw] for own in of_parts]), 1.0, "the model's head")
    return gradients


def _head_gradients(
    stream: BlockStream, rows: slice, outside: Weights, labels: Labels, chances: Tensor
) -> list[Tensor]:
    """∂ℓ/∂(hidden states behind the last block) of some windows, for every draw."""
    with torch.enable_grad():
        hidden = stream.hidden[rows].detach().requires_grad_()
        logits = stream.head(hidden, rows, outside)
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        ids = stream.tokens[rows].to(stream.device)
        losses = [labels.loss(log_p, ids, chance) for chance in chances]
        return [torch.autograd.grad(loss, hidden, retain_graph=loss is not losses[-1])[0] for loss in losses]


def _block(
    stream: BlockStream,
    index: int,
    weights: BlockWeights,
    gradients: _Gradients,
    watching: Sequence[Mapping[str, See]],
) -> None:
    """Take the gradients from behind a block to its front, and show them. stream: in front of it."""
    block = stream.model.blocks[index]
    by_linear = {
        name: [see[name] for see in watching if name in see] for name in dict.fromkeys(n for w in watching for n in w)
    }
    for rows, arguments in zip(stream.rows, stream.arguments, strict=True):
        shown = _Shown(rows)
        with ExitStack() as stack, torch.enable_grad():
            own = stack.enter_context(instrument(block, weights))
            for name, sees in by_linear.items():
                handle = block.get_submodule(name).register_forward_hook(shown.hook(sees))
                stack.callback(handle.remove)
            hidden = stream.hidden[rows].detach().requires_grad_()
            out = stream.call(index, own, rows, arguments, hidden)
        for draw in gradients.draws:
            behind, shown.scale = gradients.read(draw, rows)
            shown.draw = draw
            again = draw + 1 < len(gradients.draws)
            (front,) = torch.autograd.grad(out, hidden, behind.to(out.dtype), retain_graph=again)
            gradients.write(draw, rows, front, shown.scale, f"block {index}")


class _Shown:
    """Gives the gradients of linears to those who watch, during a backward pass of one batch."""

    def __init__(self, rows: slice) -> None:
        self.rows, self.draw, self.scale = rows, 0, 1.0

    def hook(self, sees: Sequence[See]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """A forward hook of a linear."""

        def at_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            windows = self.rows.stop - self.rows.start  # some blocks have all tokens in one dimension
            x = args[0].detach().reshape(windows, -1, args[0].shape[-1])

            def at_gradient(gradient: Tensor) -> None:
                exact = gradient if gradient.dtype == torch.float64 else gradient.float()
                exact = exact.reshape(windows, -1, gradient.shape[-1]) * self.scale
                for see in sees:
                    see(self.rows, self.draw, x, exact)

            output.register_hook(at_gradient)

        return at_output
