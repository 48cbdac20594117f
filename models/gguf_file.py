"""A GGUF file as a container of a checkpoint: tensors under transformers' names, dequantized when they are read.

F32, F16 and BF16 tensors keep their dtype. Of all other types the numbers are those of `gguf.dequantize`, in float32: a
product of a code and its scale does not go into 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from models.container import metadata_of
from models.gguf_header import StoredTensor, read_header
from models.gguf_layout import ROTARY, architecture_of, heads_of
from quant.core.errors import InputError
from quant.core.text import brief

LINK = "weights.gguf"  # beside the config.json that was made of a file's header: the file itself
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GGUFReader:
    """A directory with a link to a GGUF file and the config.json of it (`models/gguf_config.py`). Raises InputError on
    opening, in one line, for a file that is damaged or holds what is not covered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / LINK
        self.files: Sequence[Path] = [file]
        header = read_header(file.resolve())
        self._architecture = architecture_of(header.facts, header.tensors, file.resolve())
        self._heads = heads_of(header.facts, file.resolve())
        self._where: dict[str, tuple[StoredTensor, str]] = {}
        for name, tensor in header.tensors.items():
            if name == ROTARY:  # it went into config.json
                continue
            place = self._architecture.place(name)
            if place is None:
                raise InputError(
                    f"{file.resolve()}: the tensor {brief(repr(name), 60)} is none of a {header.facts['general.architecture']} "
                    "model that is read; give the model as safetensors"
                )
            check_type(tensor.type, name, file.resolve())
            self._where[place[0]] = (tensor, place[1])
        self._bytes = np.memmap(file, np.uint8, "r")

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._where

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._where[name][0].shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype that `read` returns."""
        tensor, module = self._where[name]
        return torch.float32 if self._is_offset(name, module) else PLAIN.get(tensor.type, torch.float32)

    def read(self, name: str) -> Tensor:
        """A tensor as transformers has it, on the CPU; a copy, so that nothing keeps the file open."""
        tensor, module = self._where[name]
        values = values_of(self._bytes, tensor)
        if self._is_offset(name, module):
            return values.float() - self._architecture.offset
        undo = self._architecture.undo.get(module)
        if undo is None:
            return values
        try:
            return undo(values, *self._heads).contiguous()
        except RuntimeError as error:
            raise InputError(
                f"{self.files[0].resolve()}: {tensor.name} has {tensor.shape[0]} rows, which are no rows of "
                f"{self._heads[0]} heads on {self._heads[1]}; download it again"
            ) from error

    def read_part(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of a matrix of a tensor [n, rows, columns]; all of it is dequantized."""
        return self.read(name)[index, rows]

    def metadata(self) -> dict[str, Any]:
        """The fields of the config.json beside the link."""
        return metadata_of(self.path)

    def _is_offset(self, name: str, module: str) -> bool:
        return bool(self._architecture.offset) and module.endswith("norm") and name.endswith(".weight")


def check_type(kind: GGMLQuantizationType, name: str, file: Path) -> None:
    """Raise InputError for a type of tensors that the gguf package does not dequantize."""
    if kind in PLAIN:
        return
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise InputError(
            f"{file}: {brief(repr(name), 60)} is stored as {kind.name}, which the gguf package does not dequantize; "
            "give the model in another type"
        ) from error


def values_of(data: np.ndarray, tensor: StoredTensor) -> Tensor:
    """The numbers of a tensor in the order of the file: float32, float16 or bfloat16 as they are, others dequantized."""
    raw = np.asarray(data[tensor.start : tensor.start + tensor.size])
    if tensor.type in PLAIN:
        return torch.from_numpy(raw.copy()).view(PLAIN[tensor.type]).view(tensor.shape)
    rows = raw.reshape(*tensor.shape[:-1], -1)
    return torch.from_numpy(dequantize(rows, tensor.type)).view(tensor.shape)
