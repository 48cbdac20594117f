"""What a checkpoint format is: how linears are written and read back, what config.json says, what it cannot hold.

Codes, scales and zero points go from the solver's answer into the tensors as they are; nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.core.actquant import ActSpec
from quant.core.errors import InputError
from quant.core.types import QuantizedWeight, QuantSpec

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold, as far as it is known before work begins.

    spec: None where weights stay in full precision. shapes: (out, in) of the linears. reordered: columns change their
    group (act-order without static groups). outliers, online: sparse parts, matrices behind norms. whole: whether
    every block is quantized. model_type: of config.json.
    """

    spec: QuantSpec | None
    shapes: Mapping[str, tuple[int, int]]
    act: ActSpec = field(default_factory=ActSpec)
    reordered: bool = False
    outliers: bool = False
    online: bool = False
    whole: bool = True
    model_type: str = ""

    @property
    def bits(self) -> int:
        """Stored bits of a code."""
        assert self.spec is not None
        return self.spec.code_bits

    @property
    def centered(self) -> bool:
        """Whether every zero point is 2^(bits-1), so that it need not be stored."""
        return self.spec is not None and self.spec.symmetric and self.spec.levels is None


@dataclass(frozen=True)
class Layers:
    """The linears of a checkpoint: quantized ones by full name, and those left alone."""

    quantized: Sequence[str]
    untouched: Sequence[str]
    blocks: str
    n_blocks: int


class Format(Protocol):
    """One checkpoint format."""

    name: str

    def refuses(self, content: Content) -> str | None:
        """Why it cannot hold this, with a format that can; None if it can."""

    def encode(self, weight: QuantizedWeight, content: Content) -> dict[str, Tensor]:
        """Tensors of one linear, by the last part of their names."""

    def config(self, content: Content, layers: Layers) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""

    def linears(self, names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
        """Full names of the quantized linears, from the names of a checkpoint's tensors."""

    def parts(self, weight: str) -> tuple[str, ...]:
        """Names of the tensors that may stand for a linear's weight."""

    def decode(self, name: str, read: Read, names: Iterable[str], config: Mapping[str, Any]) -> QuantizedWeight:
        """One linear read back. Raises InputError where tensors and config.json disagree."""

    def act(self, config: Mapping[str, Any]) -> ActSpec:
        """How activations are quantized."""


def half_scales(weight: QuantizedWeight, name: str) -> Tensor:
    """The scales in float16. Raises InputError where that would round them."""
    if weight.grid.scale_bits != 16:
        raise InputError(f"{name} stores scales in float16 and cannot hold these exactly: use --format bitplane")
    return weight.grid.scale.half()


def plain_groups(n_in: int, n_groups: int) -> Tensor:
    """Group of every column where they stand in order, int64 [in]."""
    return torch.arange(n_in) // -(-n_in // n_groups)
