"""An embedding with packed rows: those of the tokens at hand are unpacked as they are looked up.

Codes lie a byte's worth of consecutive columns side by side (`SmallInts`): 3 bits take 4, and 5 to 7 take 8. There is no
product here, so that one form serves every device.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant.core.levels import Table, levels_of
from quant.core.recording import as_one
from quant.core.types import Outliers, QuantizedWeight
from quant.kernels.matmul.weight import SmallInts, pack_small


@dataclass(frozen=True)
class PackedRows:
    """A matrix [rows, n] that is read row by row.

    codes: of columns first, [n, rows]. scale, minimum: float16 or float32 [rows, G]; zero: uint8 [rows, G]; of zero and
    minimum one is None. table: the levels where they are not evenly spaced. g_idx: int64 [n], the group of every column. outliers: their positions are ascending; most:
    how many of them a row has at most.
    """

    codes: SmallInts
    scale: Tensor
    zero: Tensor | None
    minimum: Tensor | None
    g_idx: Tensor
    outliers: Outliers | None = None
    table: Table | None = None
    most: int = 0

    @classmethod
    def of(cls, weight: QuantizedWeight, device: torch.device) -> PackedRows:
        """A solver's answer, packed for a device; nothing is rounded."""
        weight, grid = weight.to(device), weight.grid.to(device)
        scale = grid.scale.half() if grid.scale_bits == 16 else grid.scale
        zero = grid.zero.to(torch.uint8) if grid.minimum is None else None
        minimum = grid.minimum
        if minimum is not None and grid.minimum_bits == 16:
            minimum = minimum.half()
        codes = pack_small(weight.codes.T, weight.spec.code_bits)
        most = 0
        if weight.outliers is not None and weight.outliers.index.numel():
            most = int(torch.bincount(weight.outliers.index // weight.codes.shape[1]).max())
        return cls(codes, scale, zero, minimum, grid.g_idx, weight.outliers, grid.table, most)

    def nbytes(self) -> int:
        """Memory of all of it."""
        parts = [self.codes.data, self.scale, self.zero, self.minimum, self.g_idx]
        if self.outliers is not None:
            parts += [self.outliers.index, self.outliers.value]
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers (int64 [m], without repetition, ascending), float32 [m, n]."""
        codes = replace(self.codes, data=self.codes.data[:, numbers]).expand().T.contiguous().float()
        scale = self.scale[numbers].float()[:, self.g_idx]
        if self.table is not None:
            values = levels_of(codes, self.table) * scale
        elif self.minimum is None:
            assert self.zero is not None
            values = (codes - self.zero[numbers].float()[:, self.g_idx]) * scale
        else:
            values = codes * scale + self.minimum[numbers].float()[:, self.g_idx]
        return values if self.outliers is None else self._with_outliers(values, numbers, self.outliers)

    def _with_outliers(self, values: Tensor, numbers: Tensor, outliers: Outliers) -> Tensor:
        """The rows with the outliers that are in them added in place. Of one row ``most`` are taken, those it lacks as zeros, so that
        the host need not know how many there are; of several, as many as there are."""
        n = values.shape[1]
        first, last = torch.searchsorted(outliers.index, torch.stack([numbers, numbers + 1]) * n)
        if len(numbers) == 1:
            which = first + torch.arange(self.most, device=values.device)
            added = torch.where(which < last, outliers.value[which.clamp_(max=outliers.index.numel() - 1)].float(), 0)
            row: Tensor | int = 0
        else:
            counts = last - first
            row = torch.repeat_interleave(torch.arange(len(numbers), device=values.device), counts)
            which = first[row] + torch.arange(len(row), device=values.device) - (counts.cumsum(0) - counts)[row]
            added = outliers.value[which].float()
        values.view(-1).index_add_(0, outliers.index[which] % n + row * n, added)
        return values


class PackedEmbedding(nn.Module):
    """The embedding of a model with packed rows; whatever else its class does to a row, such as scaling it, is done."""

    def __init__(self, embedding: nn.Embedding, weight: PackedRows, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.dtype = weight, dtype
        own = copy.copy(embedding)
        own._buffers = {
            name: buffer if buffer is None or buffer.is_meta else buffer.to(weight.scale.device)
            for name, buffer in embedding._buffers.items()
        }
        own.padding_idx = None  # of training alone; a position among all rows
        self._own = [own]  # no submodule: its meta parameter must stay out of sight

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] to rows [..., n] in the model's dtype."""
        found: Tensor = as_one(self.lookup, ids)
        return found

    def lookup(self, ids: Tensor) -> Tensor:
        """As `forward`."""
        if ids.numel() == 1:  # else the host asks the device how many different ones there are, which no CUDA graph can
            numbers, places = ids.flatten(), torch.zeros_like(ids)
        else:
            numbers, places = torch.unique(ids, return_inverse=True)
        rows = self.packed.rows(numbers).to(self.dtype)
        found: Tensor = functional_call(self._own[0], {"weight": rows}, (places,))
        return found
