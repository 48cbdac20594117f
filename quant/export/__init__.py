"""Writing quantized models as checkpoints that other software loads, and reading such checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.unsupported import METHODS, WHOLE
from quant.core.errors import InputError
from quant.export.bitplane import Bitplane
from quant.export.compressed_tensors import CompressedTensors
from quant.export.float_tensors import FLOAT_FORMATS
from quant.export.formats import Content, Format, Holder
from quant.export.gguf import Gguf
from quant.export.gptq import Gptq
from quant.export.mlx import Mlx

__all__ = ["HOLDERS", "PACKED", "first_holding", "format_of", "refusal"]

PACKED: dict[str, Format] = {f.name: f for f in (Gptq("gptq", 1), Gptq("gptq_v2", 0), CompressedTensors(), Bitplane())}

KINDS = ("pack-quantized", "int-quantized", *FLOAT_FORMATS.values())  # of compressed-tensors
HOLDERS: dict[str, Holder] = {**PACKED, **{f.name: f for f in (Gguf(), Mlx())}}  # also those that are only written


def refusal(kind: str, content: Content) -> str | None:
    """Why a format, or a plain checkpoint, cannot hold this, with a format that can; None if it can."""
    if kind in HOLDERS:
        holder, alone = HOLDERS[kind], (own for _, _, own in content.of_outside())
        return next(filter(None, map(holder.refuses, (content, *alone))), None)
    if content.online:
        return "a plain checkpoint cannot hold matrices behind norms or in front of linears: use format bitplane"
    return None


def first_holding(content: Content) -> str:
    """The packed format that most software reads, of those that can hold this. Raises InputError where none can."""
    assert content.spec is not None
    names = ("gptq" if content.centered else "gptq_v2", "compressed-tensors", "bitplane")
    for name in names:
        if refusal(name, content) is None:
            return name
    raise InputError(str(refusal(names[-1], content)))


def format_of(config: Mapping[str, Any], path: Path) -> Format:
    """The format of a ``quantization_config``, of the checkpoint in ``path``. Raises InputError for one that is not read."""
    method, version = config.get("quant_method"), config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(method, str) or not isinstance(version, str):
        raise InputError(f"{path}: config.json: quant_method {method!r} with format {version!r} are no names")
    name = method
    if method == "gptq":
        if config.get("format", version) != version:
            raise InputError(f"{path}: config.json says checkpoint_format {version!r} and format {config['format']!r}")
        name, method = version if version in ("gptq", "gptq_v2") else "", f"gptq ({version})"
    elif method == "compressed-tensors" and (kind := config.get("format")) not in KINDS:
        name = method = f"compressed-tensors ({kind})"
    if name in PACKED:
        return PACKED[name]
    what = f" ({method} is {METHODS[method]})" if method in METHODS else ""
    raise InputError(
        f"{path}: quantized by {method}, which is not read; known: {', '.join(PACKED)} and plain checkpoints{what}: {WHOLE}"
    )
