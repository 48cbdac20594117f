"""One set of codes in another format: from a run directory, or from a checkpoint, without rounding anything."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from models.checkpoint import RESULTS, read_json
from models.load import LazyModel, load_model, load_tokenizer
from quant.core.config import RunConfig, check_format, content_of
from quant.core.errors import InputError
from quant.core.resident import open_run
from quant.core.types import QuantizedWeight
from quant.export import PACKED, refusal
from quant.export.formats import Content, Layers
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.export.write import (
    check_space,
    check_target,
    copy_code,
    entries,
    layers_of,
    model_config,
    model_side_files,
    packed_entries,
    save_checkpoint,
    size_of,
)

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "*.model",
    "merges.txt",
    "vocab.*",
    "*.jinja",
)


def convert(source: Path, kind: str, target: Path, overwrite: bool = False, trust_remote_code: bool = False) -> Content:
    """Write ``source`` in a format to ``target``; returns what it holds. Raises InputError where that cannot be."""
    check_target(target, overwrite, source)
    if (source / "manifest.json").exists():
        return _convert_run(source, kind, target)
    if (source / "config.json").exists():
        return _convert_checkpoint(source, kind, target, trust_remote_code)
    raise InputError(f"{source} is neither a run directory (manifest.json) nor a checkpoint (config.json)")


def _convert_run(source: Path, kind: str, target: Path) -> Content:
    run = open_run(source)
    model, n_blocks = run.model, run.n_blocks
    config = replace(run.config, format=kind, target=None)
    content = content_of(config, model.linear_shapes(), len(model.blocks), model.config.model_type)
    check_format(config, content)
    check_space(target, size_of(model, kind, content, layers_of(model, n_blocks)))

    def replaced(index: int) -> Mapping[str, Any]:
        if index >= n_blocks:
            return {}
        solved = {f"{name}.weight": weight for name, weight in run.directory.read_weights(index).items()}
        return run.directory.read_changed(index) | solved

    stream = packed_entries(entries(model, replaced), kind, content, model.storage_dtype)
    described = model_config(model, kind, content, n_blocks)
    tokenizer = load_tokenizer(model.checkpoint.path, config.trust_remote_code)
    save_checkpoint(stream, target, described, model_side_files(model, tokenizer), run.results | {"format": kind})
    return content


def _convert_checkpoint(source: Path, kind: str, target: Path, trust_remote_code: bool) -> Content:
    declared = read_json(source / "config.json")
    if not declared.pop("quantization_config", None):
        raise InputError(f"{source} is a plain checkpoint: there are no codes to convert; quantize it")
    model = load_model(str(source), dtype=None, cache_dir=RunConfig.cache_dir, opener=open_checkpoint,
                       trust_remote_code=trust_remote_code)  # fmt: skip
    checkpoint = model.checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    layers = _layers_in(model, checkpoint)
    content = checkpoint.content(whole=not any(name.startswith(f"{layers.blocks}.") for name in layers.untouched))
    if against := refusal(kind, content):
        raise InputError(against)
    check_space(target, size_of(model, kind, content, layers))
    if kind in PACKED:
        declared["quantization_config"] = PACKED[kind].config(content, layers)
    stream = packed_entries(checkpoint.entries(), kind, content, checkpoint.dtype)

    def side_files(directory: Path) -> None:
        for pattern in SIDE_FILES:
            for file in source.glob(pattern):
                shutil.copy(file, directory)
        copy_code(source, directory, declared)

    old = source / RESULTS
    results = read_json(old) if old.exists() else {}
    save_checkpoint(stream, target, declared, side_files, results | {"format": kind})
    return content


def _layers_in(model: LazyModel, checkpoint: QuantizedCheckpoint) -> Layers:
    """The linears of the module, by whether the checkpoint has them quantized. Raises InputError for quantized tensors
    that are no linear of it.
    """
    prefix, quantized = f"{model.module.base_model_prefix}.", set(checkpoint.linears)
    linears = [name for name, module in model.module.named_modules() if isinstance(module, nn.Linear)]
    spelt = {name: {name, name.removeprefix(prefix), prefix + name} & quantized for name in linears}
    if strange := quantized - set().union(*spelt.values()):
        raise InputError(f"{checkpoint.path}: {min(strange)} is quantized, but is no linear of the model")
    done, rest = ([name for name in linears if bool(spelt[name]) == held] for held in (True, False))
    return Layers(done, rest, model.family.blocks, len(model.blocks))


def same_codes(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    """Whether two answers hold the same codes, scales, zero points, groups and outliers on the same grid. How the range
    of a grid was found is not told by a checkpoint, and not compared; a grid is its codes and groups, whatever named them.
    """
    grids = [(w.spec.bits, w.spec.levels, w.spec.group_size, w.spec.symmetric, w.grid.qmax) for w in (first, second)]
    pairs = [(first.codes, second.codes), (first.grid.scale, second.grid.scale), (first.grid.zero, second.grid.zero),
             (first.grid.g_idx, second.grid.g_idx)]  # fmt: skip
    if grids[0] != grids[1] or (first.outliers is None) != (second.outliers is None):
        return False
    if first.outliers is not None and second.outliers is not None:
        pairs += [(first.outliers.index, second.outliers.index), (first.outliers.value, second.outliers.value)]
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)
