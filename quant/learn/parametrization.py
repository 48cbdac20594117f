"""What a learned ingredient is: the parameters of one place in a block, and what they make of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.types import QuantSpec
from quant.learn.config import Learning

Parameters = dict[str, Tensor]


class InputRange:
    """What the calibration inputs x [..., in] of a linear span: largest |x| of each channel, and its middle.

    shift: moving average over windows of (max + min) / 2, with OmniQuant's weight of 0.99 for the past.
    """

    def __init__(self, absmax: Tensor | None = None, shift: Tensor | None = None) -> None:
        self.absmax, self.shift = absmax, shift
        self._windows: list[Tensor] = []  # largest |x| and middle of each, [2, in], where other processes have more

    def update(self, x: Tensor) -> None:
        """Add a batch of windows [n, T, in], or rows of one window [T, in]."""
        for window in x.reshape(-1, *x.shape[-2:]).float():
            low, high = window.amin(0), window.amax(0)
            largest, middle = torch.maximum(-low, high).clamp_(min=0), (low + high) / 2
            if ranks.size() > 1:
                self._windows.append(torch.stack([largest, middle]))
            self._add(largest, middle)

    def join(self, windows: int, part: int) -> None:
        """Take in what the other processes have seen, in the order in which one process would: of every batch each has
        ``part`` of its ``windows`` windows. Where a family hands on rows of several windows as one, these take turns."""
        if ranks.size() == 1:
            return
        every = ranks.all_rows(torch.stack(self._windows)).unflatten(0, (ranks.size(), -1))  # [processes, seen, 2, in]
        part = part if every.shape[1] == windows else 1
        ordered = every.unflatten(1, (-1, part)).transpose(0, 1).flatten(0, 2)
        self.absmax = self.shift = None
        self._windows.clear()
        for largest, middle in ordered:
            self._add(largest, middle)

    def _add(self, largest: Tensor, middle: Tensor) -> None:
        self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
        self.shift = middle if self.shift is None else 0.99 * self.shift + 0.01 * middle


@dataclass(frozen=True)
class Block:
    """The block that ingredients are made for. weights: as the checkpoint holds them. spec: None where they stay."""

    model: LazyModel
    index: int
    weights: BlockWeights
    spec: QuantSpec | None
    learning: Learning

    @property
    def linears(self) -> list[str]:
        """Names of its linears, in order of execution."""
        return [name for group in self.model.groups for name in group]


class Parametrization(Protocol):
    """One ingredient at one place. Its parameters are its own, by key; `Learner` keeps them as ``<name>.<key>``, which
    block files hold, so that names stay as they are.

    rate: AdamW's. guarded: keys whose values before a step `after_step` is given. An ingredient writes what it needs of
    the rest: what is not written does nothing. BlockWeights change out of place, and gradients pass.
    """

    name: str
    rate: float
    guarded: ClassVar[tuple[str, ...]] = ()

    def initial(self, weights: BlockWeights, ranges: Mapping[str, InputRange]) -> Parameters:
        """Parameters to start from. ranges: of the linears' inputs, where ``let`` is asked for."""
        ...

    def effective(self, parameters: Parameters, progress: float) -> Parameters:
        """What the weights depend on and what is saved, at ``progress`` in [0, 1] of the training."""
        return parameters

    def raw(self, effective: Parameters) -> Parameters:
        """The parameters that have these effective ones at progress 1, to continue from."""
        return effective

    def apply(self, weights: BlockWeights, parameters: Parameters) -> BlockWeights:
        """The block's weights, not quantized, at these effective parameters."""
        return weights

    def clip(self, linear: str, low: Tensor, high: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """The range [out, G] that the grid of a linear covers, given that of its groups."""
        return low, high

    def after_step(self, parameters: Parameters, before: Parameters, progress: float) -> None:
        """Correct, in place and without gradients, what a step of the optimizer made of the parameters."""
        return

    def facts(self, parameters: Parameters) -> Mapping[str, Any]:
        """What the log says of the block: counts (int), which are added up, and margins (float), the smallest is kept."""
        return {}
