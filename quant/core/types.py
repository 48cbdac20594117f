"""What a solver takes and returns: QuantSpec, Grid, QuantizedWeight.

One convention everywhere: codes are unsigned, ``0 <= code <= qmax``, and ``w = scale * (code - zero)``
with an integer zero point, or ``w = scale * code + minimum`` with a real minimum, which for a fractional zero point is
``-scale * zero``. Codes are the truth: perplexity, sizes and checkpoints derive from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quant.core.levels import TABLES, Table, levels_of
from quant.core.names import (
    ALL_GRIDS,
    LEVEL_GRIDS,
    NARROW_COLUMNS,
    NARROW_GRIDS,
    SCALE_BITS,
    SUPER_COLUMNS,
    SUPER_GRIDS,
    LevelKind,
    SuperKind,
)
from quant.core.rounding import NumberFormat

RANGES = ("minmax", "mse")
LARGEST = torch.finfo(torch.float32).max
ZERO_STEPS = 32  # of a fractional zero point, in one step of the grid
SHORT_BITS, CUT = 11, 4  # of a float16 scale without its sign and its last bits, and how many last ones those are
FINEST = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps  # 2^-149: all are multiples of it
OUTLIER_DTYPES = (torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantSpec:
    """The grid that is asked for.

    bits: 1..8. group_size: columns that share one scale and zero point, -1 for the whole row.
    symmetric: zero point fixed at the middle of the codes (2^(bits-1)). range: ``minmax`` or ``mse``
    (search of the shrink with the least weighted squared error). levels: number of codes where it is
    not 2^bits (ABQ-LLM's bit balance uses 5 levels at 2 bits). kind: ``integer`` zero points, a ``real`` minimum, or
    ``fractional`` zero points: multiples of 1/ZERO_STEPS of a step, beside scales of 6 bits behind the point, which together
    take the bits of a float16 scale and an integer zero point. Other kinds are GGUF's super-blocks (`quant.core.superblocks`)
    and levels that are not evenly spaced (`quant.core.levels`), of bits and groups of their own.

    largest: magnitude that no level exceeds, that of the dtype in which weights are written out. finest: a scale is a
    multiple of it (a power of two), above float32's own where the weights are solved scaled up. Both belong to the
    weights and not to what is asked for: specs that differ in them alone are equal, and files do not keep them.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = False
    range: str = "minmax"
    levels: int | None = None
    kind: str = "integer"
    largest: float = field(default=LARGEST, compare=False, repr=False)
    finest: float = field(default=FINEST, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: a grid has 1 to 8 bits")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: use a positive number of columns or -1 (whole rows)")
        if self.range not in RANGES:
            raise ValueError(f"range={self.range!r}: use one of {', '.join(RANGES)}")
        if self.levels is not None and not 2 <= self.levels <= 256:
            raise ValueError(f"levels={self.levels}: a grid has 2 to 256 levels")
        if self.kind not in ALL_GRIDS:
            raise ValueError(f"kind={self.kind!r}: use one of {', '.join(ALL_GRIDS)}")
        if (fixed := self.super_kind) and (self.bits, self.group_size, self.levels) != (fixed.bits, fixed.part, None):
            raise ValueError(f"kind={self.kind!r}: it has {fixed.bits} bits in groups of {fixed.part}")
        if (own := self.level_kind) and (self.bits, self.levels) != (own.bits, None):
            raise ValueError(f"kind={self.kind!r}: it has {own.bits} bits")
        if own and self.group_size not in own.groups:
            sizes = " or ".join("whole rows" if size == -1 else f"groups of {size}" for size in own.groups)
            raise ValueError(f"kind={self.kind!r}: it has {sizes}")
        if self.symmetric and self.kind != "integer":
            raise ValueError(
                f"a symmetric grid has its zero point in the middle, and no {self.kind} one: leave one of them out"
            )
        if self.symmetric and self.numbers.levels == 2:
            raise ValueError("a symmetric grid of 2 levels holds {-scale, 0} only: use an asymmetric one or levels=3")

    @property
    def numbers(self) -> NumberFormat:
        """What codes stand for."""
        table = TABLES.get(self.kind)
        return NumberFormat(self.levels or 2**self.bits) if table is None else NumberFormat(len(table), table)

    @property
    def has_minimum(self) -> bool:
        """Whether its grids have minima, and no integer zero points."""
        return self.kind in ("real", "fractional") if self.super_kind is None else self.super_kind.minima

    @property
    def super_kind(self) -> SuperKind | None:
        """The layout of its super-blocks; None where it has none."""
        return SUPER_GRIDS.get(self.kind)

    def for_inputs(self, n_in: int) -> QuantSpec:
        """The grid of a layer of so many inputs: itself, but where rows are no whole super-blocks that of the smaller blocks
        which llama.cpp's quantizer takes in their place."""
        if self.super_kind is None or n_in % SUPER_COLUMNS == 0:
            return self
        bits, symmetric, kind = NARROW_GRIDS[self.kind]
        return replace(self, bits=bits, group_size=NARROW_COLUMNS, symmetric=symmetric, kind=kind)

    @property
    def level_kind(self) -> LevelKind | None:
        """What its scales are, where its levels are not evenly spaced; else None."""
        return LEVEL_GRIDS.get(self.kind)

    @property
    def has_zeros(self) -> bool:
        """Whether its grids store zero points."""
        return not (self.symmetric or self.has_minimum or self.level_kind)

    @property
    def has_signed_scales(self) -> bool:
        """Whether scales may be below 0, which turns the levels round: where one side of them reaches further."""
        table = self.numbers.table
        return table is not None and table[0] != -table[-1]

    @property
    def shared_rows(self) -> int:
        """How many rows share a scale."""
        return self.level_kind.rows if self.level_kind is not None and self.group_size > 0 else 1

    def level_scale_bits(self, n_out: int, n_groups: int) -> int:
        """Bits of the scales of a layer whose levels are not evenly spaced."""
        assert self.level_kind is not None
        scales = -(-n_out // self.shared_rows) * n_groups
        return scales * SCALE_BITS[self.level_kind.scale] + (32 if self.level_kind.scale == "e4m3" else 0)

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.numbers.qmax

    @property
    def code_bits(self) -> int:
        """Bits that one code takes in storage."""
        return self.numbers.code_bits

    def to_json(self) -> dict[str, Any]:
        """What files keep; ``QuantSpec(**...)`` takes it back."""
        left_out = ("largest", "finest", *(["kind"] if self.kind == "integer" else []))  # files before it have no kind
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def described(self) -> str:
        """In words."""
        if self.super_kind is not None:
            return f"the super-blocks of {self.kind}"
        if self.level_kind is not None:
            return f"the levels of {self.kind}"
        kind = "symmetric" if self.symmetric else self.kind if self.has_minimum else "asymmetric"
        groups = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{kind} grids of {self.qmax + 1} levels in {groups}"

    def n_groups(self, in_features: int) -> int:
        """Groups along the inputs of a layer. Raises ValueError where the group size, or a super-block, does not divide."""
        if self.super_kind is not None and in_features % SUPER_COLUMNS:
            raise ValueError(f"{self.kind} has super-blocks of {SUPER_COLUMNS} columns, not in_features={in_features}")
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            fits = [g for g in (32, 64, 128, 256) if in_features % g == 0]
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={in_features}; "
                f"use one of {', '.join(map(str, [*fits, -1]))}"
            )
        return in_features // self.group_size


def group_index(n_in: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The group of every column, int64 [in], where groups are columns side by side (-1: one group for all); the last
    group may be a short one."""
    return torch.arange(n_in, device=device) // (group_size if group_size > 0 else n_in)


@dataclass(frozen=True)
class BilevelScales:
    """Scales [out, G] in few bits: scale = base + codes * step, base and step shared by ``rows`` rows (SpQR).

    codes: uint8 [out, G] of ``bits`` bits. base, step: [ceil(out / rows), G], float16 (float32 where that is too
    small or too large for it).
    """

    codes: Tensor
    base: Tensor
    step: Tensor
    bits: int
    rows: int

    def expand(self, n_out: int) -> Tensor:
        """The scales, float32 [out, G]."""
        base, step = (t.float().repeat_interleave(self.rows, 0)[:n_out] for t in (self.base, self.step))
        return base + self.codes.float() * step

    def storage_bits(self) -> int:
        """Codes and their second-level numbers."""
        return self.codes.numel() * self.bits + (self.base.numel() + self.step.numel()) * self.base.itemsize * 8

    def to(self, device: torch.device | str) -> BilevelScales:
        """The same scales on a device."""
        return replace(self, codes=self.codes.to(device), base=self.base.to(device), step=self.step.to(device))


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one layer, or scales and minima.

    scale: float32 [out, G], positive (of IQ4_NL of either sign), fp16-representable wherever that costs less than 1/64 (then it is
    stored in 16 bits). zero: int32 [out, G]; 0 where there is a table of levels. g_idx: int64 [in], the group of every column. bilevel: how the scales
    are stored where they are quantized themselves (SpQR). minimum: float32 [out, G], the value of code 0 (see
    `quant.core.stored.stored_real`); None where there are zero points, else these are [out, 0].
    """

    scale: Tensor
    zero: Tensor
    g_idx: Tensor
    qmax: int
    bilevel: BilevelScales | None = None
    minimum: Tensor | None = None
    table: Table | None = None

    @classmethod
    def real(cls, scale: Tensor, minimum: Tensor, g_idx: Tensor, qmax: int) -> Grid:
        """One with a real minimum."""
        return cls(scale, scale.new_empty((scale.shape[0], 0), dtype=torch.int32), g_idx, qmax, minimum=minimum)

    @property
    def numbers(self) -> NumberFormat:
        """What codes stand for."""
        return NumberFormat(self.qmax + 1, self.table)

    @property
    def n_groups(self) -> int:
        """Groups along the inputs."""
        return self.scale.shape[1]

    @property
    def scale_bits(self) -> int:
        """16 if every scale is exactly an fp16 number, else 32."""
        return 16 if torch.equal(self.scale.half().float(), self.scale) else 32

    @property
    def minimum_bits(self) -> int:
        """16 if every minimum is exactly an fp16 number, else 32; 0 where there is none."""
        if self.minimum is None:
            return 0
        return 16 if torch.equal(self.minimum.half().float(), self.minimum) else 32

    def scale_storage_bits(self) -> int:
        """Bits of all scales."""
        return self.scale.numel() * self.scale_bits if self.bilevel is None else self.bilevel.storage_bits()

    def to(self, device: torch.device | str) -> Grid:
        """The same grid on a device."""
        bilevel = self.bilevel and self.bilevel.to(device)
        minimum = None if self.minimum is None else self.minimum.to(device)
        return replace(
            self,
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            g_idx=self.g_idx.to(device),
            bilevel=bilevel,
            minimum=minimum,
        )

    @property
    def base(self) -> Tensor:
        """The zero points, or the minima where it has those."""
        return self.zero if self.minimum is None else self.minimum

    def float_zero(self) -> Tensor:
        """Where 0 lies among the codes, a new float32 [out, G] for the loops over columns: the zero points, or
        -minimum / scale, with which scale * (code - zero) is the value but for float32's own rounding."""
        return self.zero.to(torch.float32, copy=True) if self.minimum is None else -self.minimum / self.scale

    def of_group(self, g: int) -> Grid:
        """The grid of one group, for a column of it; its tensors are parts of this one's."""
        one = slice(g, g + 1)
        minimum = None if self.minimum is None else self.minimum[:, one]
        zero = self.zero if self.minimum is not None else self.zero[:, one]
        return replace(self, scale=self.scale[:, one], zero=zero, g_idx=torch.zeros_like(self.g_idx[:1]), bilevel=None,
                       minimum=minimum)  # fmt: skip

    def expand(self) -> tuple[Tensor, Tensor]:
        """Scale of every column, and zero point or minimum, float32: [out, in], or [out, 1] where rows have one group."""
        base = self.base.float()
        if self.n_groups == 1:
            return self.scale, base
        return self._by_column(self.scale), self._by_column(base)

    def _by_column(self, x: Tensor) -> Tensor:
        """x [out, G] at the group of every column. Both ways give the same numbers; the faster one adds gradients up otherwise."""
        return x[:, self.g_idx] if x.requires_grad else x.index_select(1, self.g_idx)

    def positions(self, weight: Tensor) -> Tensor:
        """Where weight [out, in] lies among the codes, float32 and not rounded; of levels that are evenly spaced."""
        scale, base = self.expand()
        return weight / scale + base if self.minimum is None else (weight - base) / scale

    def values(self, codes: Tensor) -> Tensor:
        """Values of codes [out, in] that are float32 numbers, with gradients."""
        if self._side_by_side():
            scale, base = self.scale[:, :, None], self.base.float()[:, :, None]
            return self._of_steps(codes.reshape(len(scale), self.n_groups, -1), scale, base).flatten(1)
        return self._of_steps(codes, *self.expand())

    def _of_steps(self, codes: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        """Values of codes by scales, and zero points or minima, of their shape or one that is broadcast."""
        if self.table is not None:
            return levels_of(codes, self.table) * scale
        return (codes - base) * scale if self.minimum is None else codes * scale + base

    def _side_by_side(self) -> bool:
        """Whether nothing need be expanded: groups of one size side by side. Asked on a CPU alone (a device would be waited for),
        and not where gradients are added up, in whose order it would show."""
        learned = self.scale.requires_grad or self.base.requires_grad
        if learned or self.g_idx.device.type != "cpu" or self.n_groups == 1 or self.g_idx.numel() % self.n_groups:
            return False
        return self.has_plain_groups()

    def has_plain_groups(self) -> bool:
        """Whether column i belongs to group i // group_size, as every checkpoint format can hold."""
        n_in = self.g_idx.numel()
        return bool(torch.equal(group_index(n_in, -(-n_in // self.n_groups), self.g_idx.device), self.g_idx))

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes of weight [out, in], uint8."""
        if self.minimum is None:
            return self.numbers.codes(weight, *self.expand()).to(torch.uint8)
        return self.positions(weight).round_().clamp_(0, self.qmax).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes [out, in], float32."""
        return self.values(codes.float())


@dataclass(frozen=True)
class Outliers:
    """What is added to the dequantized weights: a few entries, or whole columns.

    index: int64 [n], ascending positions row * in + column. value: float16 [n], or float32 where that loses too much
    (see `quant.core.outliers`). whole_columns: stored as columns.
    """

    index: Tensor
    value: Tensor
    whole_columns: bool = False

    def storage_bits(self, n_out: int, n_in: int) -> int:
        """Values, and column numbers with row pointers (compressed sparse rows), or one number for each column."""
        value_bits = self.value.itemsize * 8
        if self.whole_columns:
            return self.value.numel() * value_bits + self.value.numel() // n_out * 32
        column_bits = 16 if n_in <= 1 << 16 else 32
        return self.value.numel() * (value_bits + column_bits) + (n_out + 1) * 32


@dataclass(frozen=True)
class QuantizedWeight:
    """A solver's answer for one linear layer.

    codes: uint8 [out, in]. info: what the solver wants in the journal (damping used, sweeps, ...).
    """

    codes: Tensor
    grid: Grid
    spec: QuantSpec
    info: Mapping[str, float] = field(default_factory=dict)
    outliers: Outliers | None = None

    def dequantize(self) -> Tensor:
        """The weight that is deployed, float32 [out, in]: values of the codes, plus the outliers."""
        weight = self.grid.dequantize(self.codes)
        if self.outliers is not None:
            weight.view(-1).index_add_(0, self.outliers.index, self.outliers.value.float())
        return weight

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same answer with its tensors on a device."""
        outliers = self.outliers
        if outliers is not None:
            outliers = replace(outliers, index=outliers.index.to(device), value=outliers.value.to(device))
        return replace(self, codes=self.codes.to(device), grid=self.grid.to(device), outliers=outliers)

    def storage_bits(self) -> int:
        """Bits that must be stored: codes, grid, outliers, and the column order where it is not i // group."""
        n_out, n_in = self.codes.shape
        if self.spec.super_kind is not None:
            return 8 * self.spec.super_kind.size * (n_out * n_in // SUPER_COLUMNS)
        bits = n_out * n_in * self.spec.code_bits
        if self.outliers is not None:
            bits += self.outliers.storage_bits(n_out, n_in)
        if self.spec.level_kind is not None:
            bits += self.spec.level_scale_bits(n_out, self.grid.n_groups)
        elif is_short(self.grid, self.spec):
            bits += self.grid.scale.numel() * short_bits(self.spec)
        else:
            bits += self.grid.scale_storage_bits() + self._base_bits()
        if not self.has_plain_groups():
            bits += n_in * 32
        return bits

    def _base_bits(self) -> int:
        if self.grid.minimum is not None:
            return self.grid.minimum.numel() * self.grid.minimum_bits
        return self.grid.zero.numel() * self.spec.code_bits if self.spec.has_zeros else 0

    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return self.storage_bits() / self.codes.numel()

    def has_plain_groups(self) -> bool:
        """As `Grid.has_plain_groups`."""
        return self.grid.has_plain_groups()

    def check(self) -> QuantizedWeight:
        """Return self if every stored number is legal. Raises ValueError that says which is not."""
        n_out, n_in = self.codes.shape
        grid = self.grid
        if self.codes.dtype != torch.uint8 or int(self.codes.max()) > grid.qmax:
            raise ValueError(f"codes must be uint8 in 0..{grid.qmax}")
        if grid.scale.shape != (n_out, grid.n_groups) or grid.base.shape != grid.scale.shape:
            raise ValueError(f"grid of shape {tuple(grid.scale.shape)} does not fit codes {n_out}x{n_in}")
        scale = grid.scale.abs() if self.spec.has_signed_scales else grid.scale
        if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise ValueError("scales must be finite and positive")
        _check_base(grid, self.spec)
        if grid.g_idx.shape != (n_in,) or int(grid.g_idx.max()) >= grid.n_groups or int(grid.g_idx.min()) < 0:
            raise ValueError(f"g_idx must hold {n_in} group numbers in 0..{grid.n_groups - 1}")
        if grid.bilevel is not None and not torch.equal(grid.bilevel.expand(n_out), grid.scale):
            raise ValueError("scales must be the values of their own codes")
        if self.outliers is not None:
            index, value = self.outliers.index, self.outliers.value
            legal = bool((index.diff() > 0).all()) and (index.numel() == 0 or 0 <= int(index[0]) <= int(index[-1]))
            if not legal or (index.numel() and int(index[-1]) >= n_out * n_in) or index.shape != value.shape:
                raise ValueError(f"outliers must have ascending positions in 0..{n_out * n_in - 1}, one value each")
            if bool(torch.isnan(value).any()):
                raise ValueError("an outlier is not a number")
            if value.dtype not in OUTLIER_DTYPES or not bool(torch.isfinite(value).all()):
                raise ValueError("outliers must be finite numbers in float16 or float32")
        return self


def zero_steps(grid: Grid) -> Tensor:
    """Fractional zero points in parts of a step, float32 [out, G]: whole numbers."""
    assert grid.minimum is not None
    return (-grid.minimum / grid.scale * ZERO_STEPS).round_()


def minimum_at(scale: Tensor, steps: Tensor) -> Tensor:
    """The minima of scales and fractional zero points in parts of a step."""
    return -(scale / ZERO_STEPS) * steps  # in this order: the product of the two may be infinite


def most_steps(spec: QuantSpec) -> int:
    """Fractional zero points, in parts of a step, are below."""
    return ZERO_STEPS << spec.code_bits


def short_bits(spec: QuantSpec) -> int:
    """Bits of a short scale and its fractional zero point together: those of float16 and an integer zero point."""
    return SHORT_BITS + (ZERO_STEPS.bit_length() - 1) + spec.code_bits


def is_short(grid: Grid, spec: QuantSpec) -> bool:
    """Whether a grid of fractional zero points has short scales alone: float16 numbers whose last CUT bits are 0. Others
    are stored as those of real minima are."""
    if spec.kind != "fractional":
        return False
    half = grid.scale.half()
    cut = half.view(torch.int16) & (2**CUT - 1)
    return torch.equal(half.float(), grid.scale) and not bool(cut.any())


def _check_base(grid: Grid, spec: QuantSpec) -> None:
    """Raise ValueError where zero points, or minima, are none, or ends of the grid are not finite."""
    if (grid.minimum is not None) != spec.has_minimum:
        raise ValueError(f"a grid of kind {spec.kind} has {'no ' if grid.minimum is None else 'a '}real minimum")
    if spec.kind == "fractional":
        low, high = (steps := zero_steps(grid)).aminmax()
        if low < 0 or high >= most_steps(spec) or not torch.equal(minimum_at(grid.scale, steps), grid.base):
            raise ValueError(f"zero points must be multiples of 1/{ZERO_STEPS} from 0 to below {2**spec.code_bits}")
    if grid.table != spec.numbers.table:
        raise ValueError(f"a grid of kind {spec.kind} has other levels")
    if grid.table is not None:
        top = grid.scale.abs() * max(map(abs, grid.table))
    elif grid.minimum is not None:
        if grid.zero.numel() or not bool(torch.isfinite(grid.minimum).all()):
            raise ValueError("minima must be finite, and stand in the place of zero points")
        top = grid.scale * grid.qmax + grid.minimum
    else:
        if bool((grid.zero < 0).any()) or bool((grid.zero > grid.qmax).any()):
            raise ValueError(f"zero points must lie in 0..{grid.qmax}")
        top = grid.scale * torch.maximum(grid.zero, grid.qmax - grid.zero)
    if not bool(torch.isfinite(top).all()):
        raise ValueError("scales are so large that the ends of the grid are infinite")
