"""Inputs of one linear layer that are kept to measure errors on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant.core.linalg import Energy, output_energy, relative_to, share
from quant.core.scaling import exponent_outside


class InputSample:
    """Inputs of one layer, one in ``every``, kept as they are: what errors are measured on besides, at less cost than another Gram
    matrix.

    The first token of every window is kept whatever comes of the others: many models have one large activation there, of which a
    sample would have none or too many. The others' rows are weighted, so that squares add up to those of all on average.
    """

    def __init__(self, every: int = 1) -> None:
        self.every, self._parts, self._full = every, list[Tensor](), list[Tensor]()

    def update(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add inputs x [..., in] of any floating dtype. full: those of the original model at the same tokens."""
        for parts, tensor in ((self._parts, x), (self._full, full)):
            if tensor is not None:
                parts.append(self._drawn(tensor))

    def _drawn(self, x: Tensor) -> Tensor:
        """Rows, float32 [tokens, in], of inputs [windows, tokens, in], or of some that are in no windows."""
        n_in = x.shape[-1]
        if self.every == 1:
            return x.reshape(-1, n_in).float()
        windows, first = (x[:, 1:], x[:, 0]) if x.dim() == 3 else (x.reshape(1, -1, n_in), x.new_empty(0, n_in))
        drawn = windows[:, self.every // 2 :: self.every].float()
        drawn = drawn * math.sqrt(windows.shape[1] / max(1, drawn.shape[1]))
        return torch.cat([first.float(), drawn.reshape(-1, n_in)])

    @property
    def inputs(self) -> Tensor:
        """What was kept, times the root of its weight, float32 [tokens, in]."""
        return torch.cat(self._parts)

    @property
    def full(self) -> Tensor | None:
        """What was kept of the original model's inputs, float32 [tokens, in]; None where they were not given."""
        return torch.cat(self._full) if self._full else None

    def norm(self, weight: Tensor) -> float:
        """‖W X‖² for weight [out, in], of the original model's inputs where they were given: what errors are relative to."""
        full = self.full
        return output_energy(weight, self.inputs if full is None else full)

    def errors_of(
        self, weight: Tensor, measured: Callable[[Energy], Energy] = lambda energy: energy
    ) -> Callable[[Tensor], float]:
        """What gives ‖WX - ŴX̂‖² / ‖WX‖² of a Ŵ, as `relative_to` does. measured: how ‖E X‖² of a matrix E is found by what
        measures it of any rows."""
        full = self.full
        if full is None:
            return relative_to(weight, measured(partial(output_energy, inputs=self.inputs)))
        both = torch.cat([full, self.inputs], 1)  # WX - ŴX̂ = [W, -Ŵ] of X above X̂
        factor = 2.0 ** -exponent_outside(weight)
        norm = measured(partial(output_energy, inputs=full))(weight * factor)
        energy = measured(partial(output_energy, inputs=both))

        def error(approximation: Tensor) -> float:
            lost = energy(torch.cat([weight, -approximation], 1) * factor)
            return share(lost, norm)

        return error
