"""A checkpoint's tensors as the modules of the library name and turn them, out of a container that has them otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.container import Reader
from models.stored import NUMBER, Layout


@dataclass(frozen=True)
class _Place:
    """Where a reader has a tensor of a module: under this name; of a stack, which matrix and which of how many parts."""

    name: str
    index: int | None = None
    part: int = 0
    parts: int = 1


class ArrangedReader:
    """The tensors of another reader under the modules' names and in their orientation; matrices of a stack one by one."""

    def __init__(self, reader: Reader, layout: Layout) -> None:
        self.path: Path = reader.path
        self.files: Sequence[Path] = reader.files
        self._reader, self._layout = reader, layout
        self._where: dict[str, _Place] = {}
        for stored in reader.names():
            name = layout.in_module(stored)
            stack = layout.stack_of(name)
            if stack is None or len(reader.shape(stored)) != 3:
                self._where[name] = _Place(stored)
                continue
            before = name.removesuffix(stack.name)
            for index in range(reader.shape(stored)[0]):
                for part, module in enumerate(stack.modules):
                    own = f"{before}{module.replace(NUMBER, str(index))}.weight"
                    self._where[own] = _Place(stored, index, part, len(stack.modules))

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._where

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the module's tensor, from the header."""
        place = self._where[name]
        shape = self._reader.shape(place.name)
        if place.index is not None:
            return shape[1] // place.parts, shape[2]
        return shape[::-1] if self._layout.is_transposed(name) else shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype, from the header. Raises InputError as the reader does."""
        return self._reader.dtype_of(self._where[name].name)

    def read(self, name: str) -> Tensor:
        """The module's tensor, on the CPU; of a stack no more than this is read."""
        place = self._where[name]
        if place.index is None:
            tensor = self._reader.read(place.name)
            return tensor.t().contiguous() if self._layout.is_transposed(name) else tensor
        rows = self.shape(name)[0]
        return self._reader.read_part(place.name, place.index, slice(place.part * rows, (place.part + 1) * rows))

    def read_part(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of a matrix of a tensor [n, rows, columns]."""
        return self.read(name)[index, rows]

    def metadata(self) -> dict[str, Any]:
        """What is said of the model: the fields of config.json."""
        return self._reader.metadata()
