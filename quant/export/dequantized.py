"""A plain Hugging Face checkpoint with the quantized weights written out, in the dtype of the original."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.load import LazyModel
from quant.core.errors import InputError

SHARD_BYTES = 5_000_000_000


def check_target(target: Path, overwrite: bool) -> None:
    """Raise InputError where a checkpoint cannot be written to ``target``."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--save {target} is a file; give a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"--save {target} is not empty; use another directory or --overwrite")
    parent = next(p for p in (target, *target.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--save {target} cannot be written")


def tensors(model: LazyModel, replaced: Callable[[int], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in order, a block at a time, under the names of the module's parameters."""
    inside = f"{model.family.blocks}."
    for name, _ in model.module.named_parameters():
        if not name.startswith(inside):
            yield name, model.checkpoint.read(model.key(name))
    for index, block in enumerate(model.blocks):
        new = replaced(index)
        for name, parameter in block.named_parameters():
            full = f"{inside}{index}.{name}"
            if name in new:
                yield full, new[name].to(model.storage_dtype)
            elif full in model.added:
                yield full, torch.zeros(parameter.shape, dtype=model.storage_dtype)
            else:
                yield full, model.checkpoint.read(model.key(full))


def save_dequantized(
    model: LazyModel,
    tokenizer: Any,
    replaced: Callable[[int], Mapping[str, Tensor]],
    target: Path,
    results: Mapping[str, Any],
) -> None:
    """Write config, tokenizer, weights (sharded above 5 GB) and results.json; ``target`` appears when all is there.

    replaced(index): the tensors of a block that differ from the checkpoint's, by name; empty for blocks left alone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir()
    try:
        _write_weights(tensors(model, replaced), temporary)
        config = model.config.__class__.from_dict(model.config.to_dict())
        config.dtype = model.storage_dtype
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        generation = model.checkpoint.path / "generation_config.json"
        if generation.exists():
            shutil.copy(generation, temporary)
        (temporary / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(stream: Iterator[tuple[str, Tensor]], directory: Path) -> None:
    """Shards of at most SHARD_BYTES, then the index; a single shard is model.safetensors without an index."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, directory / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in stream:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0").replace(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").replace(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for torch.float16."""
    return str(dtype).removeprefix("torch.")
