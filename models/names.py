"""What --model may be, told before anything is read."""

from __future__ import annotations

from pathlib import Path

from models.unsupported import of_directory, of_file
from quant.core.errors import InputError


def check_name(model: str) -> None:
    """Raise InputError for what is neither a model directory nor can be a hub id; nothing is read or fetched."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(of_directory(path, "config.json"))
    elif path.exists():
        raise InputError(of_file(path))
    elif path.is_absolute() or model.startswith(".") or model.count("/") != 1 and "/" in model:
        raise InputError(f"no such model directory: {model}")
