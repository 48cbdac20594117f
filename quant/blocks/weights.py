"""The weights of a block as one value, by what they are; the names of files are read and made here alone.

Parameters and buffers keep the names that torch gives them inside the block, which is how `functional_call` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.linears import LinearRef
from quant.kernels.matmul.weight import PackedWeight

ONLINE = ".online_affine"  # a matrix [n, n] behind a norm that no weight can hold: the norm's output times it
INPUT_RANGE = ".input_range"  # [2]: lowest and highest input of a linear over the calibration data, for ``static``


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block, or those that differ from the model's. parameters: its own parameters and buffers; packed:
    weights of linears, by linear; online: matrices behind norms, by norm; input_ranges: of linears, by linear."""

    parameters: Weights = field(default_factory=dict)
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    online: dict[str, Tensor] = field(default_factory=dict)
    input_ranges: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        model: LazyModel,
        index: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        without: Collection[str] = (),
    ) -> BlockWeights:
        """Those of a block of the model, as its checkpoint has them. dtype: of the parameters, where it is not that of the
        arithmetic. without: linears whose weights are not read."""
        unread = [LinearRef.of_module(linear).parameter for linear in without]
        return cls.from_named(model.block_weights(index, device, dtype, unread))

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor]) -> BlockWeights:
        """The weights that have these names in files."""
        block = cls()
        for name, tensor in tensors.items():
            if is_online(name):
                block.online[name.removesuffix(ONLINE)] = tensor
            elif is_input_range(name):
                block.input_ranges[name.removesuffix(INPUT_RANGE)] = tensor
            else:
                block.parameters[name] = tensor
        return block

    def named(self) -> Weights:
        """Their tensors under the names that they have in files; packed weights have none."""
        return {
            **self.parameters,
            **{norm + ONLINE: matrix for norm, matrix in self.online.items()},
            **{linear + INPUT_RANGE: span for linear, span in self.input_ranges.items()},
        }

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(iter(self.parameters.values())).device

    def weight(self, linear: str) -> Tensor:
        """The weight [out, in] of a linear that is not packed."""
        return LinearRef.of_module(linear).weight(self.parameters)

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockWeights:
        """Their tensors on a device, in a dtype."""
        return BlockWeights.from_named({name: tensor.to(device, dtype) for name, tensor in self.named().items()})

    def __or__(self, other: BlockWeights) -> BlockWeights:
        """These, and the other's in the place of those of the same names."""
        return self._by_part(lambda part, own: own | getattr(other, part))

    def since(self, before: BlockWeights) -> BlockWeights:
        """Those that are not the very tensors of ``before``."""

        def new(part: str, own: dict[str, Any]) -> dict[str, Any]:
            old = getattr(before, part)
            return {name: value for name, value in own.items() if value is not old.get(name)}

        return self._by_part(new)

    def within(self, index: int) -> BlockWeights:
        """The same by their names in the list of all blocks, ``<index>.<name>``."""
        return self._by_part(lambda _, own: {f"{index}.{name}": value for name, value in own.items()})

    def with_packed(self, packed: Mapping[str, PackedWeight]) -> BlockWeights:
        """These with packed weights of linears in the place of others."""
        dense = {LinearRef.of_module(linear).parameter for linear in packed}
        parameters = {name: tensor for name, tensor in self.parameters.items() if name not in dense}
        return replace(self, parameters=parameters, packed={**self.packed, **packed})

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> BlockWeights:
        """These with other parameters of some names."""
        return replace(self, parameters={**self.parameters, **parameters})

    def _by_part(self, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> BlockWeights:
        return BlockWeights(**{part.name: change(part.name, getattr(self, part.name)) for part in fields(self)})


def is_online(name: str) -> bool:
    """Whether a name in a file is that of a matrix behind a norm."""
    return name.endswith(ONLINE)


def is_input_range(name: str) -> bool:
    """Whether a name in a file is that of a fixed range of inputs."""
    return name.endswith(INPUT_RANGE)
