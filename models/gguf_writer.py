"""One GGUF file, written tensor by tensor: the header first, which says of every tensor where its bytes will lie."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
from torch import Tensor

from models.gguf_facts import Facts

FILE = "model.gguf"
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32,
}  # general.file_type, by the type of most numbers (llama.h, enum llama_ftype)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A tensor as it will be: its name in the file, its type, and its shape in numbers, [out, in]."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many there are."""
        return int(np.prod(self.shape))

    @property
    def size(self) -> int:
        """Its bytes."""
        columns, size = GGML_QUANT_SIZES[self.type]
        return self.numbers // columns * size


class GGUFFile:
    """Takes the tensors of a model in the order of ``places``: quantized ones and those in bfloat16 as uint8 [out, bytes],
    others in their dtype. Raises OSError where the disk does not take them."""

    def __init__(self, path: Path, named: str, facts: Facts, places: Iterable[Place]) -> None:
        self.path, self._left = path, list(places)
        self._writer = GGUFWriter(path, named)
        for key, value in (facts | self._of_types()).items():
            _add(self._writer, key, value)
        self._writer.add_quantization_version(GGML_QUANT_VERSION)
        for place in self._left:
            columns, size = GGML_QUANT_SIZES[place.type]
            shape = (*place.shape[:-1], place.shape[-1] // columns * size)  # the package takes it in bytes
            self._writer.add_tensor_info(place.name, shape, np.dtype(np.uint8), place.size, place.type)
        self._left.reverse()
        with _OnDisk(path):
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()

    def _of_types(self) -> Facts:
        """The type of most numbers that are in blocks, or of most."""
        numbers: dict[str, int] = {}
        in_blocks = [place for place in self._left if GGML_QUANT_SIZES[place.type][0] > 1]
        for place in in_blocks or self._left:
            numbers[place.type.name] = numbers.get(place.type.name, 0) + place.numbers
        return {"general.file_type": FILE_TYPES[max(numbers, key=lambda name: numbers[name])]}

    def put(self, name: str, tensor: Tensor) -> None:
        """The next tensor, under its name in the file."""
        place = self._left.pop()
        assert (name, tensor.nbytes) == (place.name, place.size), (name, place)
        values = tensor.contiguous()
        values = values.view(torch.uint8) if values.dtype == torch.bfloat16 else values
        with _OnDisk(self.path):
            self._writer.write_tensor_data(values.numpy())

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """All tensors are there; what is said of the model was written before them."""
        assert not self._left
        with _OnDisk(self.path):
            self._writer.close()


class _OnDisk:
    """What numpy says of a write that fell short, as the system's own error with the file's name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            number = error.errno or errno.ENOSPC  # numpy counts the bytes that went, and gives no number
            raise OSError(number, os.strerror(number), str(self.path)) from error


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A fact in the type of its value: uint32, float32, bool, text, or an array of int32, float32 or text."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
