"""A quantized checkpoint, read as if it were a plain one: linears are dequantized when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from quant.core.actquant import INPUT_RANGE
from quant.core.errors import InputError
from quant.core.seams import ONLINE
from quant.core.types import QuantizedWeight
from quant.export import format_of
from quant.export.formats import Content
from quant.export.write import Entry, sha256_of_file

SPARSE = "outlier_values"


class QuantizedCheckpoint(Checkpoint):
    """Tensors by their plain names. Raises InputError where files were edited since they were written, an unknown
    format is named, or config.json and tensors disagree.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.declared: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.quantization: dict[str, Any] = self.declared["quantization_config"]
        self.format = format_of(self.quantization)
        self.dtype: torch.dtype = getattr(
            torch, self.declared.get("dtype") or self.declared.get("torch_dtype") or "float16"
        )
        self.linears = self.format.linears(self._where, self.quantization)
        if not self.linears:
            raise InputError(f"{path}: config.json says {self.format.name}, but no tensor is quantized")
        self._check_hashes()
        try:
            self.act = self.format.act(self.quantization)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: quantization_config of config.json is not complete ({error})") from error
        parts = {f"{linear}.{part}" for linear in self.linears for part in self.format.parts("weight")}
        self._plain = [name for name in self._where if name not in parts]
        self.extra = [name for name in self._plain if name.endswith((ONLINE, INPUT_RANGE))]
        self._weights = {f"{linear}.weight": linear for linear in self.linears}

    def _check_hashes(self) -> None:
        results = self.path / "results.json"
        known = json.loads(results.read_text()).get("files_sha256", {}) if results.exists() else {}
        for file in self.files:
            if file.name in known and sha256_of_file(file) != known[file.name]:
                raise InputError(f"{file} is not what was written (its hash differs): truncated, edited or damaged")

    def __contains__(self, name: str) -> bool:
        return name in self._weights or name in self._where

    def names(self) -> Iterable[str]:
        """Names as of a plain checkpoint."""
        return [*self._plain, *self._weights]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a quantized one from its codes."""
        return tuple(self.quantized(name).codes.shape) if name in self._weights else super().shape(name)

    def read(self, name: str) -> Tensor:
        """A tensor; a quantized one dequantized, in the model's dtype."""
        return self.quantized(name).dequantize().to(self.dtype) if name in self._weights else super().read(name)

    def quantized(self, name: str) -> QuantizedWeight:
        """Codes and grid of a weight. Raises InputError where they are not legal."""
        linear = self._weights[name]
        try:
            return self.format.decode(linear, super().read, self._where, self.quantization).check()
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{self.path}: {linear} does not fit config.json ({error})") from error

    def entries(self) -> Iterator[Entry]:
        """Everything in it, for another format."""
        for name in self._plain:
            yield name, super().read(name)
        for name in self._weights:
            yield name, self.quantized(name)

    def storage(self) -> tuple[int, int]:
        """Bits that the quantized weights take, and their number."""
        found = [self.quantized(name) for name in self._weights]
        return sum(weight.storage_bits() for weight in found), sum(weight.codes.numel() for weight in found)

    def content(self) -> Content:
        """What another format has to hold; all linears must have one kind of grid."""
        shapes: dict[str, tuple[int, int]] = {}
        reordered, specs = False, {}
        for name, linear in self._weights.items():
            found = self.quantized(name)
            specs[found.spec], shapes[linear] = linear, (found.codes.shape[0], found.codes.shape[1])
            reordered = reordered or not found.has_plain_groups()
        if len(specs) > 1:
            first, second = list(specs.values())[:2]
            raise InputError(f"{first} and {second} have different grids; only one grid for all linears is converted")
        outliers = any(name.endswith((SPARSE, "scale_codes")) for name in self._where)
        return Content(
            next(iter(specs)),
            shapes,
            self.act,
            reordered,
            outliers,
            online=bool(self.extra),
            model_type=self.declared["model_type"],
        )


def open_checkpoint(path: Path, declared: Mapping[str, Any]) -> Checkpoint:
    """A plain or a quantized checkpoint, as its config.json says."""
    return QuantizedCheckpoint(path) if declared.get("quantization_config") else Checkpoint(path)
