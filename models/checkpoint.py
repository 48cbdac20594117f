"""A model's checkpoint: found, fetched, and held against what was written; its tensors one by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from models import layout_for
from models.arranged import ArrangedReader
from models.container import INDEX, SINGLE, Reader, SafetensorsReader, has_safetensors
from models.gguf_file import LINK, GGUFReader
from models.names import check_name, gguf_of
from models.pickles import BIN_INDEX, BIN_SINGLE, convert_bin
from models.side_files import SIDE_FILES, side_files
from models.unsupported import of_directory
from quant.core.errors import InputError
from quant.core.files import check_plain_file, is_plain_name, json_sha256, read_json, sha256_of_file

WEIGHTS = ["model*.safetensors", "gptq_model*.safetensors"]
RESULTS = "results.json"  # of checkpoints that this toolkit wrote: hashes of their files
SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(model: str, cache_dir: Path, with_weights: bool = True) -> Path:
    """The local directory of a model: itself, or the hub's snapshot of it (weights in safetensors only).

    A checkpoint that has `.bin` files only is converted, shard by shard, under ``cache_dir``; of a GGUF file, or a directory
    with one, what it says of the model is written there.
    Raises InputError where there is no such directory, no configuration, or no way to the hub.
    """
    check_name(model)
    if file := gguf_of(Path(model)):
        from models.gguf_config import unpack  # transformers, for these files alone

        return unpack(file, cache_dir)
    path = Path(model) if Path(model).is_dir() else _download(model, with_weights)
    for file in side_files(path):
        check_plain_file(file)
    if with_weights and not has_safetensors(path):
        if any((path / name).exists() for name in (BIN_SINGLE, BIN_INDEX)):
            return convert_bin(path, cache_dir)
        raise InputError(of_directory(path, f"weights ({SINGLE} or {INDEX})"))
    return path


def _download(model: str, with_weights: bool) -> Path:
    """The hub's snapshot of a model (from the hub's own cache where it is there): safetensors if it has them."""
    try:
        path = Path(snapshot_download(model, allow_patterns=SIDE_FILES + WEIGHTS * with_weights))
        if with_weights and not has_safetensors(path):
            snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model} is neither a local directory nor a model that the hub gives ({type(error).__name__}); "
            "check the name, log in if it is gated, or pass a local directory"
        ) from error
    if not (path / "config.json").is_file():
        raise InputError(of_directory(path, "config.json"))
    return path


class Checkpoint:
    """A model's tensors by their modules' plain names, out of a container (where none is given, that of the directory).

    layout: how the container has them; where none is given, as the family of its model type stores them.

    Raises InputError on opening where anything is not what the checkpoint's own results.json says was written.
    """

    extra: Sequence[str] = ()  # tensors of blocks that are no parameters of the library's modules
    computes = False  # whether a tensor that is read takes products, whose precision is a matter of the whole process

    def __init__(self, path: Path, reader: Reader | None = None) -> None:
        self.path = path
        raw: Reader = reader or (GGUFReader(path) if (path / LINK).exists() else SafetensorsReader(path))
        self.raw, self.layout = raw, layout_for(raw.metadata().get("model_type"))
        self.reader: Reader = raw if self.layout.is_plain else ArrangedReader(raw, self.layout)
        self.files = self.reader.files
        results = path / RESULTS
        if results.exists() and (changed := unlike_written(path, read_json(results))):
            raise InputError(changed)

    def __contains__(self, name: str) -> bool:
        return name in self.reader

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.reader.shape(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header. Raises InputError for one that torch does not have."""
        return self.reader.dtype_of(name)

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, in the checkpoint's own dtype."""
        return self.reader.read(name)

    def stored(self, name: str) -> Tensor:
        """A tensor in the dtype that a plain checkpoint keeps it in."""
        return self.read(name)

    def sha256(self) -> str:
        """Hash over the files' own hashes; the hub's cache names its files by theirs, others are read."""
        return hashlib.sha256("".join(_file_sha256(file) for file in self.files).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    blob = file.resolve()
    of_hub = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return blob.name if of_hub and SHA256.fullmatch(blob.name) else sha256_of_file(file)


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
