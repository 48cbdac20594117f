"""Reading a checkpoint tensor by tensor: single-file or sharded safetensors; `.bin` files are converted once."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.names import check_name
from quant.core.errors import InputError
from quant.core.files import check_plain_file, is_plain_name, json_sha256, locked, read_json, resolved, sha256_of_file

log = logging.getLogger(__name__)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# *.py: classes that a config.json with auto_map names
SIDE_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.*", "additional_chat_templates/*",
              "*.py", "README*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]  # fmt: skip
RESULTS = "results.json"  # of checkpoints that this toolkit wrote: hashes of their files
CONVERSION_SECONDS = 3600.0  # that another process may take to convert what this one waits for
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(model: str, cache_dir: Path, with_weights: bool = True) -> Path:
    """The local directory of a model: itself, or the hub's snapshot of it (weights in safetensors only).

    A checkpoint that has `.bin` files only is converted, shard by shard, under ``cache_dir``.
    Raises InputError where there is no such directory, no configuration, or no way to the hub.
    """
    check_name(model)
    path = Path(model) if Path(model).is_dir() else _download(model, with_weights)
    for file in side_files(path):
        check_plain_file(file)
    if with_weights and not any((path / name).exists() for name in (SINGLE, INDEX)):
        if any((path / name).exists() for name in (BIN_SINGLE, BIN_INDEX)):
            return _convert_bin(path, cache_dir)
        raise InputError(f"{model} holds no weights: expected {SINGLE} or {INDEX}")
    return path


def side_files(path: Path) -> Iterator[Path]:
    """What belongs to a model besides its weights, in the order of the names."""
    yield from sorted({file for pattern in SIDE_FILES for file in path.glob(pattern)})


def check_own(file: Path, directory: Path) -> None:
    """Raise InputError for a file of a model that is a link to somewhere else: it would be copied with the model. Links
    into the hub's cache, and to the file of the same name in another model's directory, are taken for what they are.
    """
    target = resolved(file)
    hub = target.parent.name == "blobs" and (
        target.parent.parent.name.startswith("models--") or target.parent.parent == directory.resolve().parent.parent
    )
    other_model = (
        target.name == file.name
        and (target.parent / "config.json").is_file()
        and any(target.parent.glob("*.safetensors"))
    )
    if not (target.is_relative_to(directory.resolve()) or hub or other_model):
        raise InputError(f"{file} is a link to {target}, outside of the model: put a copy of it in its place")


def _download(model: str, with_weights: bool) -> Path:
    """The hub's snapshot of a model (from the hub's own cache where it is there): safetensors if it has them."""
    try:
        path = Path(snapshot_download(model, allow_patterns=SIDE_FILES + ["model*.safetensors"] * with_weights))
        if with_weights and not any((path / name).exists() for name in (SINGLE, INDEX)):
            snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model} is neither a local directory nor a model that the hub gives ({type(error).__name__}); "
            "check the name, log in if it is gated, or pass a local directory"
        ) from error
    if not (path / "config.json").is_file():
        raise InputError(f"{model} holds no config.json")
    return path


class Checkpoint:
    """Tensors of a safetensors checkpoint by name, read when asked for.

    Raises InputError on opening where a shard is missing, truncated or not safetensors, or where anything is not what the
    checkpoint's own results.json says was written, and where two shards give a tensor different values.
    """

    extra: Sequence[str] = ()  # tensors of blocks that are no parameters of the library's modules

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path / name for name in _shards(path, SINGLE, INDEX)]
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
        if strange := _strangers(path, self.files):
            log.warning("%s: these files belong to no shard that is read: %s", path, ", ".join(strange))
        results = path / RESULTS
        if results.exists() and (changed := unlike_written(path, read_json(results))):
            raise InputError(changed)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._where

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
        """A tensor, on the CPU, in the checkpoint's own dtype."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def stored(self, name: str) -> Tensor:
        """A tensor in the dtype that a plain checkpoint keeps it in."""
        return self.read(name)

    def sha256(self) -> str:
        """Hash over the files' own hashes; the hub's cache names its files by theirs, others are read."""
        return hashlib.sha256("".join(_file_sha256(file) for file in self.files).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    name = file.resolve().name
    if SHA256.fullmatch(name):
        return name
    return sha256_of_file(file)


def _strangers(path: Path, shards: Sequence[Path]) -> list[str]:
    """Names of weight files that lie beside the shards and are not among them, but for what a known other program reads:
    consolidated files hold the same model in its makers' own form."""
    names = {file.name for file in path.glob("*.safetensors")} - {file.name for file in shards}
    return sorted(name for name in names if not name.startswith("consolidated"))


def unlike_written(path: Path, results: Mapping[str, Any]) -> str | None:
    """What of the checkpoint ``path`` is not as its results.json says, in words; None if all is, or nothing is said.

    ``files_sha256`` has the hash of every file; ``config_sha256`` that of config.json, which says what the tensors mean
    (``quantization_sha256``, of its quantization_config, is all that earlier versions wrote).
    """
    hashes = results.get("files_sha256", {})
    if not isinstance(hashes, dict):
        return f"{path / RESULTS}: files_sha256 is no JSON object; delete the file, or make the checkpoint again"
    for name, digest in hashes.items():
        if not is_plain_name(name):
            return (
                f"{path / RESULTS}: {name!r} is not the name of a file; delete the file, or make the checkpoint again"
            )
        file = path / name
        if not file.is_file():
            return f"{file} is missing, but {RESULTS} says that it was written; make the checkpoint again"
        if sha256_of_file(file) != digest:
            return f"{file} is not what was written (its hash differs): truncated, edited or damaged"
    config = path / "config.json"
    declared = read_json(config) if config.is_file() else {}
    parts = (("quantization_sha256", ": quantization_config", declared.get("quantization_config")),
             ("config_sha256", "", declared))  # fmt: skip
    for key, where, part in parts:
        if results.get(key) is not None and json_sha256(part or {}) != results[key]:
            return f"{config}{where} is not what was written (its hash differs): edited or damaged"
    return None


def _shards(path: Path, single: str, index: str) -> list[str]:
    """File names of a checkpoint's shards. Raises InputError for an index that names anything but files beside it: it
    comes with the checkpoint, and must not say where else to read or write."""
    if (path / single).exists():
        return [single]
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


def _convert_bin(path: Path, cache_dir: Path) -> Path:
    """Convert `.bin` shards, one in memory at a time, to safetensors under the cache. Returns that directory.

    Only tensors are unpickled (``weights_only=True``). The index is written last and marks a whole conversion.
    """
    shards = _shards(path, BIN_SINGLE, BIN_INDEX)
    for name in shards:
        check_plain_file(path / name)
        if not (path / name).exists():
            raise InputError(f"shard {path / name} is missing; download the checkpoint again")
    sides = [file for file in side_files(path) if file.name != BIN_INDEX]
    for file in sides:
        check_own(file, path)
    stamp = [(name, (path / name).stat().st_size, (path / name).stat().st_mtime_ns) for name in shards]
    key = hashlib.sha256(json.dumps([str(path.resolve()), stamp]).encode()).hexdigest()[:16]
    target = cache_dir / "converted" / f"{path.name}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock"), f"the conversion of {path}", patience=CONVERSION_SECONDS):
        if not (target / INDEX).exists():
            _convert_shards(path, shards, sides, target)
    return target


def _convert_shards(path: Path, shards: Sequence[str], sides: Sequence[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(shards, 1):
        tensors = _read_bin(path / name)
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"  # not the source's name, whatever that is
        seen: dict[int, str] = {}
        own = {k: v for k, v in tensors.items() if seen.setdefault(v.data_ptr(), k) == k}
        write_tensors({k: v.contiguous() for k, v in own.items()}, target / f"{file}.tmp")
        (target / f"{file}.tmp").replace(target / file)
        weight_map.update(dict.fromkeys(own, file))
    for side in sides:
        copy = target / side.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(side.read_bytes())
    temporary = target / f"{INDEX}.tmp"
    temporary.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    temporary.replace(target / INDEX)


def _read_bin(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"shard {file} is missing; download the checkpoint again") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{file} is not a readable PyTorch weight file (weights only)") from error
    return loaded
