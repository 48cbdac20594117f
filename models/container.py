"""What a checkpoint is kept in: tensors by name, and what is said of the model. A directory of safetensors is one container,
and all that uses one asks for no more than `Reader` and `Writer`, so that a single file can be another."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.unsupported import is_mlx
from quant.core.errors import InputError
from quant.core.files import check_plain_file, is_plain_name, read_json, write_json

log = logging.getLogger(__name__)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GPTQ_CONFIG = "config.json", "quantize_config.json"
SHARD_BYTES = 5_000_000_000
SHOWN = 3  # names in a message
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Reader(Protocol):
    """Tensors by name, read when asked for. path: the container; files: those that hold the tensors."""

    path: Path
    files: Sequence[Path]

    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it. Raises InputError for one that torch does not have."""

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""

    def read_part(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of a matrix of a tensor [n, rows, columns] as it is stored, on the CPU; no more than that is read where the
        container can."""

    def metadata(self) -> dict[str, Any]:
        """What is said of the model: the fields of config.json."""


class Writer(Protocol):
    """Takes a checkpoint's tensors one at a time."""

    def put(self, name: str, tensor: Tensor) -> None:
        """One tensor; names come once each, in the order in which they are stored."""

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """All tensors are there: write what is left, and what is said of the model."""


class SafetensorsReader:
    """A directory of safetensors. Raises InputError on opening where a shard is missing, truncated or not safetensors, and
    where two shards give a tensor different values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Sequence[Path] = [path / name for name in shards(path, SINGLE, INDEX)]
        self._where: dict[str, Any] = {}
        for file in self.files:
            check_plain_file(file)
            try:
                handle = safe_open(file, framework="pt")
            except FileNotFoundError as error:
                raise InputError(f"{path}: shard {file.name} is missing; download the checkpoint again") from error
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is truncated or not a safetensors file ({error})") from error
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                other = self._where.setdefault(name, handle)
                if other is not handle and not torch.equal(other.get_tensor(name), handle.get_tensor(name)):
                    raise InputError(
                        f"{path}: two shards hold {name} with different values; download the checkpoint again"
                    )
        if absent := _absent(path, self.files, self._where):
            shown = ", ".join(absent[:SHOWN]) + (f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else "")
            log.warning("%s: %s lists tensors that no shard holds: %s", path, INDEX, shown)
        if strange := _strangers(path, self.files):
            log.warning("%s: these files belong to no shard that is read: %s", path, ", ".join(strange))

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._where

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header. Raises InputError for those of other software (4-bit floats, ...)."""
        stored = self._where[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise InputError(
                f"{self.path}: {name} is stored as {stored}, which is not read; give the unquantized model"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def read_part(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of a matrix of a tensor [n, rows, columns]; no more is read."""
        part: Tensor = self._where[name].get_slice(name)[index, rows]
        return part

    def metadata(self) -> dict[str, Any]:
        """The fields of config.json (see `metadata_of`)."""
        return metadata_of(self.path)


class SafetensorsWriter:
    """A directory of safetensors: shards of at most ``shard_bytes`` and an index, or a single model.safetensors. It is
    whole when ``finish`` returns, which writes config.json last."""

    def __init__(self, directory: Path, shard_bytes: int | None = None) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes or SHARD_BYTES
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._size = self._total = 0

    def put(self, name: str, tensor: Tensor) -> None:
        """One tensor; a shard is written when it is full."""
        if self._pending and self._size + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.cpu().contiguous()
        self._size, self._total = self._size + tensor.nbytes, self._total + tensor.nbytes

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """The last shard, the index where there are several, config.json; quantize_config.json of GPTQ, for auto-gptq."""
        self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
            (self.directory / f"shard-{number}").replace(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.directory / INDEX, index)
        quantization = metadata.get("quantization_config", {})
        if quantization.get("quant_method") == "gptq":
            write_json(self.directory / GPTQ_CONFIG, quantization)
        write_json(self.directory / CONFIG, metadata)

    def _flush(self) -> None:
        write_tensors(self._pending, self.directory / f"shard-{len(self._shards)}")
        self._shards.append(list(self._pending))
        self._pending.clear()
        self._size = 0


def _absent(path: Path, files: Sequence[Path], held: Collection[str]) -> list[str]:
    """Names of tensors that the index puts into the shards and that are in none of them."""
    by_index = (path / INDEX).exists() and files[0].name != SINGLE
    return sorted(set(read_json(path / INDEX)["weight_map"]) - set(held)) if by_index else []


def _strangers(path: Path, shards: Sequence[Path]) -> list[str]:
    """Names of weight files that lie beside the shards and are not among them, but for what a known other program reads:
    consolidated files hold the same model in its makers' own form."""
    names = {file.name for file in path.glob("*.safetensors")} - {file.name for file in shards}
    return sorted(name for name in names if not name.startswith("consolidated"))


def metadata_of(path: Path) -> dict[str, Any]:
    """What a model's directory says of the model: config.json, its ``quantization_config`` also where software keeps it
    elsewhere (auto-gptq of 2023 in quantize_config.json alone, MLX under ``quantization``)."""
    declared, alone = read_json(path / CONFIG), path / GPTQ_CONFIG
    if is_mlx(declared):
        return declared | {"quantization_config": {"quant_method": "mlx"}}
    if not declared.get("quantization_config") and alone.exists():
        return declared | {"quantization_config": {"quant_method": "gptq"} | read_json(alone)}
    return declared


def shards(path: Path, single: str, index: str) -> list[str]:
    """File names of a checkpoint's shards. Raises InputError for an index that names anything but files beside it: it
    comes with the checkpoint, and must not say where else to read or write."""
    if (path / single).exists():
        return [single]
    if not (path / index).exists() and (named := of_auto_gptq(path)):
        return [named]
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / index} is not a checkpoint index: it has no weight_map; download it again")
    for tensor, name in weight_map.items():
        if not is_plain_name(name):
            raise InputError(
                f"{path / index}: {tensor!r} is said to be in {name!r}, which is not the name of a file in {path}; "
                "download the checkpoint again"
            )
    return sorted(set(weight_map.values()))


def has_safetensors(path: Path) -> bool:
    """Whether a directory holds weights that `SafetensorsReader` opens, or their index."""
    return (path / SINGLE).exists() or (path / INDEX).exists() or of_auto_gptq(path) is not None


def of_auto_gptq(path: Path) -> str | None:
    """The weights of a directory where auto-gptq named them after bits and groups; None where there are none, or several."""
    names = [file.name for file in path.glob("gptq_model*.safetensors")]
    return names[0] if len(names) == 1 and (path / GPTQ_CONFIG).exists() else None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions of any new file. Raises OSError where the disk does not take it, which
    safetensors reports as an error of its own.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # safetensors renames a temporary file of mode 0600
    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, str(error), str(path)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
