"""What gradients say of tokens and of weights: how much each token counts for a part of a linear's rows, and what a change of
a weight costs the model.

Token weights (GuidedQuant, arXiv 2505.07004, section 3): the rows of a linear are cut into R parts, and a token t counts
for part r as s_tr = mean over the rows i of r of (∂ℓ/∂y_ti)². With Ĥ_r = Σ_t s_tr x_t x_tᵀ the quadratic of every row is
then that of the model's loss, averaged over its part. Rows are scale free, so that only the relative size of the tokens
matters: weights have mean 1; above CLAMP they are cut (a few tokens would decide everything), and have mean 1 again.

Sensitivity: to second order, a change D of one linear's weight moves the divergence from the model by ½ E[(Σ_t g_tᵀ D x_t)²],
the sum over the tokens of a window, with g = ∂ℓ/∂y and labels that the model draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quant.blocks.backward import See
from quant.blocks.stream import Activations, BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.parts import row_parts

CLAMP = 10.0  # times the mean


def mean_square(gradient: Tensor, parts: int) -> Tensor:
    """s before it is normalized: of g [..., out], [..., parts]."""
    squares = gradient.square()
    return torch.stack([squares[..., rows].mean(-1) for rows in row_parts(gradient.shape[-1], parts)], -1)


def normalized(weights: Tensor) -> Tensor:
    """Token weights [n, T, parts] with mean 1 in each part, none above CLAMP before the last division. Where no token has a
    gradient all count alike."""
    mean = weights.mean((0, 1))
    weights = torch.where(mean > 0, weights / mean.where(mean > 0, 1.0), 1.0).clamp(max=CLAMP)
    return weights / weights.mean((0, 1))


class TokenWeights:
    """Token weights of every linear of the first blocks, from a backward pass that it watches; kept where the stream keeps
    its hidden states, in 16 bits where those have 16."""

    def __init__(self, stream: BlockStream, parts: int, n_blocks: int) -> None:
        self.parts, self.n_blocks, self._stream = parts, n_blocks, stream
        self._rows = {name: row_parts(n_out, parts) for name, (n_out, _) in stream.model.linear_shapes().items()}
        self._columns, self._width = dict[str, slice](), 0
        for name, rows in self._rows.items():
            self._columns[name] = slice(self._width, self._width + len(rows))
            self._width += len(rows)
        self._kept: dict[int, Activations] = {}
        self._sums: dict[str, Tensor] = {}

    def begin(self, index: int, weights: BlockWeights, stream: BlockStream) -> Mapping[str, See]:
        """All linears of the blocks that are quantized."""
        if index >= self.n_blocks:
            return {}
        shape, device = self._stream.tokens.shape, self._stream.device
        self._sums = {name: torch.zeros(*shape, len(rows), device=device) for name, rows in self._rows.items()}
        return {name: partial(self._see, name) for name in self._rows}

    def _see(self, name: str, rows: slice, draw: int, x: Tensor, gradient: Tensor) -> None:
        self._sums[name][rows] += mean_square(gradient, self.parts)

    def end(self, index: int) -> None:
        """Keep those of a block."""
        if index >= self.n_blocks:
            return
        model = self._stream.model
        dtype = torch.float16 if model.dtype.itemsize == 2 else torch.float32
        self._kept[index] = self._stream.new_store(self._width, dtype)
        everything = torch.cat([normalized(self._sums[name]) for name in self._rows], -1).to(dtype)
        for rows in self._stream.rows:
            self._kept[index][rows] = everything[rows]
        self._sums = {}

    def rows(self, name: str) -> list[slice]:
        """The parts of a linear's rows."""
        return self._rows[name]

    def of(self, index: int, name: str, rows: slice) -> Tensor:
        """Those of some windows for a linear, float32 [tokens, parts]."""
        return self._kept[index][rows][..., self._columns[name]].float().flatten(0, 1)

    def drop(self, index: int) -> None:
        """Those of a block are not needed any more."""
        del self._kept[index]


# Of a block, in front of which a stream of full precision stands: changes [out, in] by linear
Candidates = Callable[[int, BlockWeights, BlockStream], Mapping[str, Sequence[Tensor]]]


@dataclass
class Sensitivity:
    """What K changes D of one linear's weight do to the loss, float64 [K] each, means over draws and tokens.

    per_window: E[(Σ_t g_tᵀ D x_t)²] divided by the tokens of a window; half of it is the divergence a token, to second order.
    per_token: E[(g_tᵀ D x_t)²], which leaves out what tokens of a window do together, and needs fewer of them.
    """

    per_window: Tensor
    per_token: Tensor


class Sensitivities:
    """Sensitivities of changes of weights, from a backward pass that it watches. candidates: of every block, asked for when
    the pass comes to it; linears without one are left out."""

    def __init__(self, stream: BlockStream, draws: int, candidates: Candidates) -> None:
        self._count = stream.tokens.numel() * draws
        self._candidates, self._of_block = candidates, dict[str, Sensitivity]()
        self.by_block: dict[int, dict[str, Sensitivity]] = {}

    def begin(self, index: int, weights: BlockWeights, stream: BlockStream) -> Mapping[str, See]:
        """Linears that have candidates."""
        changes = self._candidates(index, weights, stream)
        self._of_block = {
            name: Sensitivity(*(torch.zeros(len(own), dtype=torch.float64) for _ in range(2)))
            for name, own in changes.items()
        }
        return {name: partial(self._see, name, own) for name, own in changes.items()}

    def _see(self, name: str, changes: Sequence[Tensor], rows: slice, draw: int, x: Tensor, gradient: Tensor) -> None:
        x = x.to(gradient)
        moves = torch.stack([((x @ change.to(x).T) * gradient).sum(-1) for change in changes]).double()  # [K, b, T]
        self._of_block[name].per_window += moves.sum(-1).square().sum(-1).cpu()
        self._of_block[name].per_token += moves.square().sum((-2, -1)).cpu()

    def end(self, index: int) -> None:
        """Keep those of a block."""
        self.by_block[index] = {
            name: Sensitivity(own.per_window / self._count, own.per_token / self._count)
            for name, own in self._of_block.items()
        }
