"""What a block is given besides its own parameters, as fields; its names in dictionaries and files are made and read here
alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from quant.kernels.matmul.weight import PackedWeight

Deployed = Mapping[str, Tensor | PackedWeight]  # by name: a block's parameters and buffers, linears packed or not
ONLINE = ".online_affine"  # a matrix [n, n] behind a norm that no weight can hold: the norm's output times it
INPUT_RANGE = ".input_range"  # [2]: lowest and highest input of a linear over the calibration data, for ``static``


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block. parameters: its own parameters and buffers; packed: weights of linears, by linear;
    online: matrices behind norms, by norm; input_ranges: of linears, by linear."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    online: dict[str, Tensor] = field(default_factory=dict)
    input_ranges: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_named(cls, weights: Deployed) -> BlockWeights:
        """The weights that a dictionary holds under their names in files."""
        block = cls()
        for name, value in weights.items():
            if isinstance(value, PackedWeight):
                block.packed[name.removesuffix(".weight")] = value
            elif is_online(name):
                block.online[name.removesuffix(ONLINE)] = value
            elif is_input_range(name):
                block.input_ranges[name.removesuffix(INPUT_RANGE)] = value
            else:
                block.parameters[name] = value
        return block


def online_name(norm: str) -> str:
    """The name of the matrix behind a norm."""
    return norm + ONLINE


def input_range_name(linear: str) -> str:
    """The name of the fixed range of a linear's inputs."""
    return linear + INPUT_RANGE


def is_online(name: str) -> bool:
    """Whether a name is that of a matrix behind a norm."""
    return name.endswith(ONLINE)


def is_input_range(name: str) -> bool:
    """Whether a name is that of a fixed range of inputs."""
    return name.endswith(INPUT_RANGE)
