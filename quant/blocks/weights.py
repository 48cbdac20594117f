"""The weights of a block as one value, by what they are; the names of files are read and made here alone.

Parameters and buffers keep the names that torch gives them inside the block, which is how `functional_call` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel, Read, Weights
from quant.blocks.linears import LinearRef
from quant.blocks.online import AND, flops_of
from quant.kernels.matmul.weight import PackedWeight

ONLINE, INPUT_RANGE = ".online_affine", ".input_range"
ENDINGS = {  # of names in files, by part; of the linears that read one tensor, the names are joined
    "online": ONLINE,  # [n, n], behind a norm that no weight can hold: the norm's output times it
    "input_ranges": INPUT_RANGE,  # [2]: lowest and highest input of a linear over the calibration data, for ``static``
    "lefts": ".online_left",
    "rights": ".online_right",
    "input_clips": ".input_clip",
    "head_matrices": ".online_heads",
    "head_clips": ".head_clips",
}
ONLINE_DTYPE = torch.float16  # of what is learned beside the weights, whatever the checkpoint's own
ONLINE_PARTS = tuple(
    part for part in ENDINGS if part != "input_ranges"
)  # what a block computes with beside its parameters


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block, or those that differ from the model's. parameters: its own parameters and buffers; packed:
    weights of linears, by linear; online: matrices behind norms, by norm; input_ranges: of linears, by linear.

    lefts, rights: P1 [p1, p1] and P2 [p2, p2] in front of all linears that read one tensor, by their names joined by AND;
    either may be missing. input_clips: of the same, factors [2] of the lowest and highest input of a token. head_matrices,
    head_clips: of the heads, by attention module. `quant.blocks.online` computes with them.
    """

    parameters: Weights = field(default_factory=dict)
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    online: dict[str, Tensor] = field(default_factory=dict)
    input_ranges: dict[str, Tensor] = field(default_factory=dict)
    lefts: dict[str, Tensor] = field(default_factory=dict)
    rights: dict[str, Tensor] = field(default_factory=dict)
    input_clips: dict[str, Tensor] = field(default_factory=dict)
    head_matrices: dict[str, Tensor] = field(default_factory=dict)
    head_clips: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        model: LazyModel,
        index: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        without: Collection[str] = (),
        read: Read | None = None,
    ) -> BlockWeights:
        """Those of a block of the model, as its checkpoint has them. dtype: of the parameters, where it is not that of the
        arithmetic. without: linears whose weights are not read. read: gives tensors in the place of the checkpoint."""
        unread = [LinearRef.of_module(linear).parameter for linear in without]
        return cls.from_named(model.block_weights(index, device, dtype, unread, read))

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor]) -> BlockWeights:
        """The weights that have these names in files."""
        block = cls()
        for name, tensor in tensors.items():
            part = part_of(name)
            getattr(block, part)[name.removesuffix(ENDINGS.get(part, ""))] = tensor
        return block

    def named(self) -> Weights:
        """Their tensors under the names that they have in files; packed weights have none."""
        others = {k + end: tensor for part, end in ENDINGS.items() for k, tensor in getattr(self, part).items()}
        return {**self.parameters, **others}

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

    def online_numbers(self) -> int:
        """How many numbers are stored of matrices and clips that a block computes with beside its parameters."""
        return sum(tensor.numel() for name, tensor in self.named().items() if is_online(name))

    def online_flops(self, head_rows: int) -> int:
        """Flops a token of the matrices. These are the weights of a whole block; head_rows: of its queries and keys."""
        flops = sum(2 * matrix.numel() for matrix in self.online.values())
        for readers in {*self.lefts, *self.rights}:
            n_in = self.weight(readers.split(AND)[0]).shape[1]
            flops += flops_of(n_in, self.lefts.get(readers), self.rights.get(readers))
        return flops + sum(2 * head_rows * matrix.shape[0] for matrix in self.head_matrices.values())

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

        def inside(name: str) -> str:
            return AND.join(f"{index}.{one}" for one in name.split(AND))

        return self._by_part(lambda _, own: {inside(name): value for name, value in own.items()})

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


def part_of(name: str) -> str:
    """The part of a block's weights that a name in a file belongs to."""
    return next((part for part, end in ENDINGS.items() if name.endswith(end)), "parameters")


def is_online(name: str) -> bool:
    """Whether a name in a file is that of something that a block computes with beside its parameters: matrices behind
    norms, in front of linears and of heads, and clips of what goes into them."""
    return part_of(name) in ONLINE_PARTS


def is_input_range(name: str) -> bool:
    """Whether a name in a file is that of a fixed range of inputs."""
    return part_of(name) == "input_ranges"
