"""What a solver takes and returns: QuantSpec, Grid, QuantizedWeight.

One convention everywhere: codes are unsigned, ``0 <= code <= qmax``, and ``w = scale * (code - zero)``
with an integer zero point. Codes are the truth: perplexity, sizes and checkpoints derive from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RANGES = ("minmax", "mse")


@dataclass(frozen=True)
class QuantSpec:
    """The grid that is asked for.

    bits: 1..8. group_size: columns that share one scale and zero point, -1 for the whole row.
    symmetric: zero point fixed at the middle of the codes (2^(bits-1)). range: ``minmax`` or ``mse``
    (search of the shrink with the least weighted squared error). levels: number of codes where it is
    not 2^bits (ABQ-LLM's bit balance uses 5 levels at 2 bits).
    """

    bits: int
    group_size: int = -1
    symmetric: bool = False
    range: str = "minmax"
    levels: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: a grid has 1 to 8 bits")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: use a positive number of columns or -1 (whole rows)")
        if self.range not in RANGES:
            raise ValueError(f"range={self.range!r}: use one of {', '.join(RANGES)}")
        if self.levels is not None and not 2 <= self.levels <= 256:
            raise ValueError(f"levels={self.levels}: a grid has 2 to 256 levels")
        if self.symmetric and self.n_levels == 2:
            raise ValueError("a symmetric grid of 2 levels holds {-scale, 0} only: use an asymmetric one or levels=3")

    @property
    def n_levels(self) -> int:
        """Number of codes."""
        return self.levels or 2**self.bits

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.n_levels - 1

    @property
    def code_bits(self) -> int:
        """Bits that one code takes in storage (3 for five levels)."""
        return math.ceil(math.log2(self.n_levels))

    def n_groups(self, in_features: int) -> int:
        """Groups along the inputs of a layer. Raises ValueError where the group size does not divide."""
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            fits = [g for g in (32, 64, 128, 256) if in_features % g == 0]
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={in_features}; "
                f"use one of {', '.join(map(str, [*fits, -1]))}"
            )
        return in_features // self.group_size


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one layer.

    scale: float32 [out, G], positive, fp16-representable wherever that costs less than 1/64 (then it is
    stored in 16 bits). zero: int32 [out, G]. g_idx: int64 [in], the group of every column.
    """

    scale: Tensor
    zero: Tensor
    g_idx: Tensor
    qmax: int

    @property
    def n_groups(self) -> int:
        """Groups along the inputs."""
        return self.scale.shape[1]

    @property
    def scale_bits(self) -> int:
        """16 if every scale is exactly an fp16 number, else 32."""
        return 16 if torch.equal(self.scale.half().float(), self.scale) else 32

    def expand(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every column, float32: [out, in], or [out, 1] where rows have one group."""
        if self.n_groups == 1:
            return self.scale, self.zero.float()
        return self.scale[:, self.g_idx], self.zero.float()[:, self.g_idx]

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes of weight [out, in], uint8."""
        scale, zero = self.expand()
        return (torch.round(weight / scale) + zero).clamp_(0, self.qmax).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes [out, in], float32."""
        scale, zero = self.expand()
        return (codes.float() - zero) * scale


@dataclass(frozen=True)
class QuantizedWeight:
    """A solver's answer for one linear layer.

    codes: uint8 [out, in]. info: what the solver wants in the journal (damping used, sweeps, ...).
    """

    codes: Tensor
    grid: Grid
    spec: QuantSpec
    info: Mapping[str, float] = field(default_factory=dict)

    def dequantize(self) -> Tensor:
        """The weight that is deployed, float32 [out, in]."""
        return self.grid.dequantize(self.codes)

    def storage_bits(self) -> int:
        """Bits that must be stored: codes, scales, zero points, and the column order where it is not i // group."""
        n_out, n_in = self.codes.shape
        bits = n_out * n_in * self.spec.code_bits + self.grid.scale.numel() * self.grid.scale_bits
        if not self.spec.symmetric:
            bits += self.grid.zero.numel() * self.spec.code_bits
        if not self.has_plain_groups():
            bits += n_in * 32
        return bits

    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return self.storage_bits() / self.codes.numel()

    def has_plain_groups(self) -> bool:
        """Whether column i belongs to group i // group_size, as every checkpoint format can hold."""
        n_in, n_groups = self.codes.shape[1], self.grid.n_groups
        plain = torch.arange(n_in, device=self.grid.g_idx.device) // -(-n_in // n_groups)
        return bool(torch.equal(plain, self.grid.g_idx))

    def check(self) -> QuantizedWeight:
        """Return self if every stored number is legal. Raises ValueError that says which is not."""
        n_out, n_in = self.codes.shape
        grid = self.grid
        if self.codes.dtype != torch.uint8 or int(self.codes.max()) > grid.qmax:
            raise ValueError(f"codes must be uint8 in 0..{grid.qmax}")
        if grid.scale.shape != (n_out, grid.n_groups) or grid.zero.shape != grid.scale.shape:
            raise ValueError(f"grid of shape {tuple(grid.scale.shape)} does not fit codes {n_out}x{n_in}")
        if not bool(torch.isfinite(grid.scale).all()) or bool((grid.scale <= 0).any()):
            raise ValueError("scales must be finite and positive")
        if bool((grid.zero < 0).any()) or bool((grid.zero > grid.qmax).any()):
            raise ValueError(f"zero points must lie in 0..{grid.qmax}")
        if grid.g_idx.shape != (n_in,) or int(grid.g_idx.max()) >= grid.n_groups or int(grid.g_idx.min()) < 0:
            raise ValueError(f"g_idx must hold {n_in} group numbers in 0..{grid.n_groups - 1}")
        return self
