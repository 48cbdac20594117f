"""Inputs of one linear layer that are kept to measure errors on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant.core.linalg import Energy, output_energy, relative_to, share
from quant.core.scaling import exponent_outside


class InputSample:
    """Every n-th input of one layer, kept as it is: what errors are measured on besides, at less cost than another Gram
    matrix."""

    def __init__(self, every: int = 1) -> None:
        self.every, self._parts, self._full = every, list[Tensor](), list[Tensor]()

    def update(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add inputs x [..., in] of any floating dtype. full: those of the original model at the same tokens."""
        for parts, tensor in ((self._parts, x), (self._full, full)):
            if tensor is not None:
                parts.append(tensor.reshape(-1, tensor.shape[-1])[:: self.every].float())

    @property
    def inputs(self) -> Tensor:
        """What was kept, float32 [tokens, in]."""
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
