"""Products with packed weights of 1 to 8 bits: codes stay packed in memory and meet the inputs in registers.

    y[o] = Σ_g scale[g, o] (Σ_i code[o, i] x[i] - zero[g, o] Σ_i x[i]),    i over the columns of group g,

plus sparse outliers; with a real minimum, zero is 0 and Σ_g minimum[g, o] Σ_i x[i] is added. How codes are kept is the matter of a `Layout`, one for each kind of device: bit planes in tiles of
rows on a CPU (`packed_cpu`), words of 1, 2, 4 and 8 bits on CUDA (`packed_cuda`). Scales, zero points and outliers take
the bits that `QuantizedWeight.storage_bits` counts, but for zero points of 3 bits, kept in 4, and of 5 to 7, kept in 8.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quant.core.recording import as_one

log = logging.getLogger(__name__)
TILE = 32  # rows are filled up to a multiple of it
WORD = 32  # columns are filled up to a multiple of it
QUAD = 4  # columns of a group are filled up to a multiple of it
PRODUCTS = 16 << 20  # bytes of the products of inputs and sparse outliers that are held at a time
IntegerInputs = tuple[Tensor, Tensor, Tensor]  # int8 [n, in], scale float32 [n], offset float32 [n]


class Layout(Protocol):
    """How codes lie in the memory of one kind of device, and the products with them."""

    def pack(self, codes: Tensor, bits: int) -> tuple[Tensor, ...]:
        """Codes uint8 [rows, columns] of a weight, filled up, in this layout."""

    def unpack(self, stored: tuple[Tensor, ...], bits: int) -> Tensor:
        """The codes uint8 [rows, columns] again."""

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x float [n, columns], arranged as the codes are, times the weight without its outliers: float32 [n, rows]."""

    def takes_integers(self, weight: PackedWeight, n: int) -> bool:
        """Whether n tokens of integer inputs are faster than the floats they stand for."""

    def integer_matmul(self, x: Tensor, scale: Tensor, offset: Tensor, weight: PackedWeight) -> Tensor:
        """As `matmul` for inputs scale[n] · (x[n] + offset[n]), x int8."""


@dataclass(frozen=True)
class SmallInts:
    """Integers [G, rows] of ``width`` 1, 2, 4 or 8 bits, those of consecutive groups in one byte: uint8 [ceil(G·width/8), rows]."""

    data: Tensor
    width: int
    n_groups: int

    def expand(self) -> Tensor:
        """The integers, uint8 [G, rows]."""
        per = 8 // self.width
        parts = [(self.data >> (p * self.width)) & (2**self.width - 1) for p in range(per)]
        return torch.stack(parts, 1).flatten(0, 1)[: self.n_groups]


def pack_small(values: Tensor, bits: int) -> SmallInts:
    """Integers [G, rows] below 2^bits in the narrowest width that divides a byte."""
    width = next(w for w in (1, 2, 4, 8) if w >= bits)
    per, values = 8 // width, values.to(torch.uint8).contiguous()  # kernels take rows as they lie
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % per)).view(-1, per, values.shape[1])
    data = padded[:, 0].clone()
    for p in range(1, per):
        data |= padded[:, p] << (p * width)
    return SmallInts(data, width, values.shape[0])


@dataclass(frozen=True)
class PackedGrid:
    """Scales and zero points, groups first.

    scale [G, rows] float16, or float32 where that would round them. zero: [G, rows], or one number for all (symmetric).
    codes, step: scales in few bits are scale + codes · step, with scale and step [G, ceil(out / shared)] (SpQR). minimum:
    [G, rows], float16 or float32, of real grids.
    """

    scale: Tensor
    zero: SmallInts | int
    codes: SmallInts | None = None
    step: Tensor | None = None
    shared: int = 1
    minimum: Tensor | None = None

    def scales(self) -> Tensor:
        """Float32 [G, rows]."""
        if self.codes is None or self.step is None:
            return self.scale.float()
        rows = self.codes.data.shape[1]
        base, step = (t.float().repeat_interleave(self.shared, 1) for t in (self.scale, self.step))
        base, step = (F.pad(t, (0, max(0, rows - t.shape[1])))[:, :rows] for t in (base, step))
        return base + self.codes.expand().float() * step

    def zeros(self) -> Tensor:
        """Float32 [G, rows] or [1, 1]."""
        if isinstance(self.zero, int):
            return torch.full((1, 1), float(self.zero), device=self.scale.device)
        return self.zero.expand().float()

    def of_rows(self, first: int, last: int) -> PackedGrid:
        """Those of the rows ``first`` to ``last`` alone, in the same memory; not for scales in few bits."""
        own, zero = slice(first, last), self.zero
        if isinstance(zero, SmallInts):
            zero = replace(zero, data=zero.data[:, own])
        minimum = None if self.minimum is None else self.minimum[:, own]
        return replace(self, scale=self.scale[:, own], zero=zero, minimum=minimum)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        small = [part.data for part in (self.zero, self.codes) if isinstance(part, SmallInts)]
        return [self.scale, *small, *(t for t in (self.step, self.minimum) if t is not None)]


@dataclass(frozen=True)
class SparseRows:
    """Outliers in compressed rows: rows int32 [out + 1], columns int16 holding unsigned numbers (int32 above 65536
    columns), values float16 or float32."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def column_numbers(self) -> Tensor:
        """Columns as int64."""
        return self.columns.long() & 0xFFFF if self.columns.dtype == torch.int16 else self.columns.long()

    def add_to(self, weight: Tensor) -> Tensor:
        """weight [out, in] with the outliers added in place."""
        row = torch.repeat_interleave(torch.arange(weight.shape[0], device=weight.device), self.rows.long().diff())
        return weight.index_put_((row, self.column_numbers()), self.values.to(weight.dtype), accumulate=True)

    def sparse(self, n_in: int) -> Tensor:
        """The outliers as torch's own matrix in compressed rows, float32 [out, in]."""
        size = (self.rows.numel() - 1, n_in)
        with warnings.catch_warnings():  # that such matrices are new
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(
                self.rows, self.column_numbers().int(), self.values.float(), size=size, check_invariants=False
            )

    def matmul(self, x: Tensor) -> Tensor:
        """x float32 [n, in] times the outliers: float32 [n, out]; by the library on CUDA, else products of so many tokens at a
        time as fit in PRODUCTS bytes."""
        if _by_library(x):
            return (self.sparse(x.shape[1]) @ x.T).T
        columns, values, rows = self.column_numbers(), self.values.float()[:, None], self.rows.long()
        step = max(1, PRODUCTS // (4 * max(1, columns.numel())))
        out = x.new_empty(x.shape[0], rows.numel() - 1)
        for own in (slice(first, first + step) for first in range(0, x.shape[0], step)):
            products = x[own].T[columns].mul_(values)
            out[own] = torch.segment_reduce(products, "sum", offsets=rows, axis=0).T
        return out


def _by_library(x: Tensor) -> bool:
    """Whether sparse products are the library's: on CUDA, whose stretches for a cache would be hundreds of launches; where only
    deterministic algorithms are wanted its sums may be in another order every time."""
    return x.is_cuda and not torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True)
class PackedColumns:
    """Outliers that are whole columns: columns int32 [k], values float16 or float32 [out, k]."""

    columns: Tensor
    values: Tensor

    def add_to(self, weight: Tensor) -> Tensor:
        """weight [out, in] with the outliers added in place."""
        return weight.index_add_(1, self.columns.long(), self.values.to(weight.dtype))

    def matmul(self, x: Tensor) -> Tensor:
        """x float32 [n, in] times the outliers: float32 [n, out]."""
        return x[:, self.columns.long()] @ self.values.float().T


@dataclass(frozen=True)
class PackedWeight:
    """A linear's weight, packed for one device.

    group: columns of a group, filled up to a multiple of 4. order: int64 [in], columns sorted by group where they are not.
    beside, part: the product of which its own is a part, and which.
    """

    layout: Layout
    bits: int
    n_out: int
    n_in: int
    group: int
    stored: tuple[Tensor, ...]
    grid: PackedGrid
    order: Tensor | None = None
    outliers: SparseRows | PackedColumns | None = None
    beside: Beside | None = None
    part: int = 0
    _kept: tuple[Any, ...] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def n_groups(self) -> int:
        """Groups along the inputs."""
        return self.grid.scale.shape[0]

    def once(self, make: Callable[[PackedWeight], tuple[Any, ...]]) -> tuple[Any, ...]:
        """make(self), kept: what the kernels of its layout take of it."""
        if self._kept is None:
            object.__setattr__(self, "_kept", make(self))
        assert self._kept is not None
        return self._kept

    @cached_property
    def ones(self) -> Tensor:
        """int8 [columns]: one for every column of the weight, zero where groups are filled up."""
        return self.arrange(torch.ones(1, self.n_in, dtype=torch.int8, device=self.grid.scale.device))[0]

    def nbytes(self) -> int:
        """Memory of all of it."""
        parts = [*self.stored, *self.grid.tensors()]
        if self.outliers is not None:
            parts += [t for t in vars(self.outliers).values() if isinstance(t, Tensor)]
        if self.order is not None:
            parts.append(self.order)
        return sum(part.nbytes for part in parts)

    def arrange(self, columns: Tensor) -> Tensor:
        """[n, in] in the order of the codes, filled up with zeros: [n, columns]."""
        if self.order is not None:
            columns = columns[:, self.order]
        return arrange(columns, self.n_groups, self.group)

    def codes(self) -> Tensor:
        """The codes uint8 [out, in] again, columns sorted by group."""
        codes = self.layout.unpack(self.stored, self.bits)[: self.n_out, : self.n_groups * self.group]
        own = -(-self.n_in // self.n_groups)
        return codes.view(self.n_out, self.n_groups, self.group)[:, :, :own].flatten(1)[:, : self.n_in]

    def dequantize(self) -> Tensor:
        """The weight float32 [out, in], with its outliers."""
        own = -(-self.n_in // self.n_groups)

        def of_columns(values: Tensor) -> Tensor:
            return values.expand(self.n_groups, -1).repeat_interleave(own, 0).T[: self.n_out, : self.n_in]

        values = (self.codes().float() - of_columns(self.grid.zeros())) * of_columns(self.grid.scales())
        if self.grid.minimum is not None:
            values += of_columns(self.grid.minimum.float())
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values if self.outliers is None else self.outliers.add_to(values)

    def _with_minima(self, y: Tensor, x: Tensor) -> Tensor:
        """y [n, rows] with minimum times the sums of inputs over groups, for x float32 [n, columns] as codes are arranged."""
        assert self.grid.minimum is not None
        sums = x[:, : self.n_groups * self.group].reshape(x.shape[0], self.n_groups, self.group).sum(-1)
        return y.addmm(sums, self.grid.minimum.float())

    def matmul(self, x: Tensor) -> Tensor:
        """x [n, in] times the weight transposed, float32 [n, out]."""
        arranged = self.arrange(x)
        y = self.layout.matmul(arranged, self)
        if self.grid.minimum is not None:
            y = self._with_minima(y, arranged.float())
        y = y if y.shape[1] == self.n_out else y[:, : self.n_out]
        return y if self.outliers is None else y + self.outliers.matmul(x.float())

    def integer_matmul(self, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """As `matmul` for inputs scale[n] · (x[n] + offset[n]), x int8 [n, in]."""
        arranged = self.arrange(x)
        y = self.layout.integer_matmul(arranged, scale, offset, self)
        if self.grid.minimum is not None:
            y = self._with_minima(y, floats_of(arranged, scale, offset, self))
        y = y[:, : self.n_out]
        if self.outliers is None:
            return y
        return y + self.outliers.matmul((x.float() + offset[:, None]) * scale[:, None])


def arrange(columns: Tensor, n_groups: int, group: int) -> Tensor:
    """[n, in], sorted by group, with every group filled up to ``group`` and all to a multiple of WORD, by zeros."""
    n, n_in = columns.shape
    own = -(-n_in // n_groups)
    if own != group:
        columns = F.pad(F.pad(columns, (0, own * n_groups - n_in)).view(n, n_groups, own), (0, group - own)).flatten(1)
    missing = -(-n_groups * group // WORD) * WORD - columns.shape[1]
    return (F.pad(columns, (0, missing)) if missing else columns).contiguous()


def floats_of(x: Tensor, scale: Tensor, offset: Tensor, weight: PackedWeight) -> Tensor:
    """What arranged integer inputs stand for; columns that fill up stay zero."""
    return (x.float() + offset[:, None]) * scale[:, None] * weight.ones


class Expanded:
    """The plainest layout, a byte a code, for devices without kernels, and the reference of the others."""

    def pack(self, codes: Tensor, bits: int) -> tuple[Tensor, ...]:
        """As they are."""
        return (codes,)

    def unpack(self, stored: tuple[Tensor, ...], bits: int) -> Tensor:
        """As they are."""
        return stored[0]

    def matmul(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """The equation of this file, group by group."""
        codes = self.unpack(weight.stored, weight.bits).float()
        scale, zero = weight.grid.scales(), weight.grid.zeros().expand(weight.n_groups, -1)
        y = torch.zeros(x.shape[0], codes.shape[0], device=x.device)
        for g in range(weight.n_groups):
            own = slice(g * weight.group, (g + 1) * weight.group)
            part = x[:, own].float()
            y += scale[g] * (part @ codes[:, own].T - zero[g] * part.sum(1, keepdim=True))
        return y

    def takes_integers(self, weight: PackedWeight, n: int) -> bool:
        """Never."""
        return False

    def integer_matmul(self, x: Tensor, scale: Tensor, offset: Tensor, weight: PackedWeight) -> Tensor:
        """By the floats that the integers stand for."""
        return self.matmul(floats_of(x, scale, offset, weight), weight)


class Beside:
    """Weights that one tensor is multiplied by, as one product: the linear that is called first computes it for all.

    It is kept until every other has taken its rows, or another tensor comes.
    """

    def __init__(self, whole: PackedWeight) -> None:
        self.whole = whole
        self.rows: list[slice] = []  # of the weights
        self.seen: Tensor | None = None
        self.product: Tensor | None = None
        self.waiting: set[int] = set()

    def add(self, weight: PackedWeight, first: int) -> PackedWeight:
        """The weight [out, in] of the rows from ``first`` on, which keeps no copy of them."""
        tiles, last = weight.stored[0].shape[0], first + weight.grid.scale.shape[1]
        per = weight.grid.scale.shape[1] // tiles
        stored = tuple(part[first // per : last // per] for part in self.whole.stored)
        grid, which = self.whole.grid.of_rows(first, last), len(self.rows)
        self.rows.append(slice(first, first + weight.n_out))
        return replace(weight, stored=stored, grid=grid, beside=self, part=which)

    def take(self, x: Tensor, which: int) -> Tensor:
        """x [..., in] times one of the weights: float32 [..., out]."""
        if self.seen is not x or which not in self.waiting:
            self.seen, self.product, self.waiting = x, as_one(self._multiply, x), set(range(len(self.rows)))
        assert self.product is not None
        own = self.product[..., self.rows[which]]
        self.waiting.discard(which)
        if not self.waiting:
            self.seen = self.product = None
        return own.contiguous()  # what comes next may want it as the linear's own

    def _multiply(self, x: Tensor) -> Tensor:
        y = self.whole.matmul(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


def side_by_side(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """The same weights [out, in], as parts of one product; as they are where their codes do not lie alike, are sorted, or have
    outliers."""
    first = weights[0]
    plain = all(w.outliers is None and w.order is None and w.grid.codes is None for w in weights)
    if len(weights) == 1 or not plain or any(_form(weight) != _form(first) for weight in weights):
        return list(weights)
    stored = tuple(torch.cat(parts) for parts in zip(*(weight.stored for weight in weights), strict=True))
    grid = _joined([weight.grid for weight in weights])
    beside = Beside(replace(first, n_out=grid.scale.shape[1], stored=stored, grid=grid))
    starts = accumulate((weight.grid.scale.shape[1] for weight in weights), initial=0)
    return [beside.add(weight, start) for weight, start in zip(weights, starts, strict=False)]


def _form(weight: PackedWeight) -> tuple[Any, ...]:
    """What weights of one product have in common."""
    grid = weight.grid
    zero = grid.zero if isinstance(grid.zero, int) else (grid.zero.width, grid.zero.n_groups)
    minimum = None if grid.minimum is None else grid.minimum.dtype
    return (type(weight.layout), weight.bits, weight.n_in, weight.group, grid.scale.dtype, zero, minimum)


def _joined(grids: Sequence[PackedGrid]) -> PackedGrid:
    """One grid with the rows of all."""
    first, zero, minimum = grids[0], grids[0].zero, None
    if isinstance(zero, SmallInts):
        zero = replace(zero, data=torch.cat([grid.zero.data for grid in grids if isinstance(grid.zero, SmallInts)], 1))
    if first.minimum is not None:
        minimum = torch.cat([grid.minimum for grid in grids if grid.minimum is not None], 1)
    return replace(first, scale=torch.cat([grid.scale for grid in grids], 1), zero=zero, minimum=minimum)


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed.

    floats, integers: how inputs are quantized, as the values they stand for or as `IntegerInputs`; None leaves them.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        floats: Callable[[Tensor], Tensor] | None = None,
        integers: Callable[[Tensor], IntegerInputs] | None = None,
    ) -> None:
        super().__init__()
        self.packed, self.bias, self.floats, self.integers = weight, bias, floats, integers
        self.in_features, self.out_features = weight.n_in, weight.n_out

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        beside = self.packed.beside
        if beside is None or self.integers is not None or self.floats is not None:
            return as_one(self.product, x)
        y = beside.take(x, self.packed.part)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """As `forward`."""
        rows: Any = x.reshape(-1, x.shape[-1])
        if self.integers is not None and self.packed.layout.takes_integers(self.packed, rows.shape[0]):
            y = self.packed.integer_matmul(*self.integers(rows))
        else:
            y = self.packed.matmul(rows if self.floats is None else self.floats(rows))
        if self.bias is not None:
            y = y + self.bias.float()
        y = y.view(*x.shape[:-1], self.out_features)
        return y if y.dtype == x.dtype else y.to(x.dtype)
