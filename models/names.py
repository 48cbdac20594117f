"""What --model may be, told before anything is read."""

from __future__ import annotations

from pathlib import Path

from models.unsupported import is_gguf, of_directory, of_file
from quant.core.errors import InputError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")  # beside them, a GGUF file is not read


def check_name(model: str) -> None:
    """Raise InputError for what is neither a model directory nor can be a hub id; nothing is read or fetched."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file() and gguf_of(path) is None:
            raise InputError(of_directory(path, "config.json"))
    elif path.exists():
        if gguf_of(path) is None:
            raise InputError(of_file(path))
    elif path.is_absolute() or model.startswith(".") or model.count("/") != 1 and "/" in model:
        raise InputError(f"no such model directory: {model}")


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a directory without other weights. None if none."""
    if not path.is_dir():
        return path if is_gguf(path) else None
    files = [file for file in path.glob("*.gguf") if file.is_file()]
    return files[0] if len(files) == 1 and not any(any(path.glob(pattern)) for pattern in WEIGHTS) else None
