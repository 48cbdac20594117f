"""Converting `.bin` checkpoints, which are pickles, to safetensors under the cache, once. Only tensors are unpickled."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.container import INDEX, shards, write_tensors
from models.side_files import check_own, side_files
from quant.core.errors import InputError
from quant.core.files import check_plain_file, hold_lock
from quant.core.text import brief

BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONVERSION_SECONDS = 3600.0  # that another process may take to convert what this one waits for


def convert_bin(path: Path, cache_dir: Path) -> Path:
    """Convert `.bin` shards, one in memory at a time, to safetensors under the cache. Returns that directory.

    The index is written last and marks a whole conversion.
    """
    names = shards(path, BIN_SINGLE, BIN_INDEX)
    for name in names:
        check_plain_file(path / name)
        if not (path / name).exists():
            raise InputError(f"shard {path / name} is missing; download the checkpoint again")
    sides = [file for file in side_files(path) if file.name != BIN_INDEX]
    for file in sides:
        check_own(file, path)
    stamp = [(name, (path / name).stat().st_size, (path / name).stat().st_mtime_ns) for name in names]
    key = hashlib.sha256(json.dumps([str(path.resolve()), stamp]).encode()).hexdigest()[:16]
    target = cache_dir / "converted" / f"{path.name}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(target.with_name(f".{target.name}.lock"), f"the conversion of {path}", patience=CONVERSION_SECONDS):
        if not (target / INDEX).exists():
            _convert_shards(path, names, sides, target)
    return target


def _convert_shards(path: Path, names: Sequence[str], sides: Sequence[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        tensors = _apart(read_bin(path / name))
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"  # not the source's name, whatever that is
        write_tensors(tensors, target / f"{file}.tmp")
        (target / f"{file}.tmp").replace(target / file)
        weight_map.update(dict.fromkeys(tensors, file))
    for side in sides:
        copy = target / side.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(side.read_bytes())
    temporary = target / f"{INDEX}.tmp"
    temporary.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    temporary.replace(target / INDEX)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with a memory of its own for each, as a safetensors file has."""
    held: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone().contiguous() if memory in held else tensor.contiguous()
        held.add(memory)
    return apart


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file by name, of torch before 1.6 too. Raises InputError, with the file's name, for whatever
    else it holds."""
    check_plain_file(file)
    try:  # files of torch before 1.6 are no archives, and cannot be mapped
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except MemoryError:
        raise
    except Exception as error:  # whatever a pickle leads to
        raise InputError(f"{file} is not a readable PyTorch weight file (weights only)") from error
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{file} holds no tensors by name, but {_kind(loaded)}")
    for name, tensor in loaded.items():
        if (fault := _fault(name, tensor)) is not None:
            raise InputError(
                f"{file}: {brief(repr(name), 80)} is {fault}, where a tensor has to be: save a state_dict again"
            )
    return loaded


def _fault(name: object, tensor: object) -> str | None:
    """What keeps an entry of a state_dict from being a dense tensor with a name; None if nothing."""
    if not isinstance(name, str) or not name.isprintable():
        return "no name"
    if not isinstance(tensor, Tensor):
        return _kind(tensor)
    if tensor.is_meta:
        return "a tensor without values (on meta)"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return f"a tensor of {tensor.dtype}"
    return None


def _kind(value: object) -> str:
    return f"nothing ({type(value).__name__})" if value in (None, {}) else f"a {type(value).__name__}"
