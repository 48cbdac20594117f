"""What a block is given by name besides its parameters, in memory and in files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quant.kernels.matmul.weight import PackedWeight

Deployed = Mapping[str, Tensor | PackedWeight]  # a block's parameters and buffers, linears packed or not
ONLINE = ".online_affine"  # a matrix [n, n] behind a norm that no weight can hold: the norm's output times it
INPUT_RANGE = ".input_range"  # [2]: lowest and highest input of a linear over the calibration data, for ``static``
