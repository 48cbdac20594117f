"""One set of codes in another format: from a run directory, or from a checkpoint, without rounding anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.load import load_model, load_tokenizer
from quant.core.errors import InputError
from quant.core.journal import RunDirectory
from quant.core.run import FULL_BITS, RunConfig, check_format, content_of
from quant.core.types import QuantizedWeight
from quant.export import PACKED
from quant.export.formats import Content, Layers
from quant.export.read import QuantizedCheckpoint
from quant.export.write import (
    check_target,
    entries,
    model_config,
    model_side_files,
    packed_entries,
    save_checkpoint,
)

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "*.model",
    "merges.txt",
    "vocab.*",
    "*.jinja",
)


def convert(source: Path, kind: str, target: Path, overwrite: bool = False) -> Content:
    """Write ``source`` in a format to ``target``; returns what it holds. Raises InputError where that cannot be."""
    check_target(target, overwrite)
    if (source / "manifest.json").exists():
        return _convert_run(source, kind, target)
    if (source / "config.json").exists():
        return _convert_checkpoint(source, kind, target)
    raise InputError(f"{source} is neither a run directory (manifest.json) nor a checkpoint (config.json)")


def _convert_run(source: Path, kind: str, target: Path) -> Content:
    run = RunDirectory(source)
    manifest, results = run.read("manifest.json"), run.read("results.json")
    assert manifest is not None
    if results is None:
        raise InputError(f"{source} has no results.json: the run is not finished; the same command continues it")
    config = replace(RunConfig.from_json(manifest["request"]), format=kind, target=None)
    if config.wbits == FULL_BITS:
        raise InputError(f"{source}: no weight was quantized there")
    biases = config.learning is not None and config.learning.transform.shift
    model = load_model(config.model, dtype=None, cache_dir=config.cache_dir, biases=biases)
    if model.checkpoint.sha256() != manifest["model"]["sha256"]:
        raise InputError(f"{config.model} is not the model of the run any more: its weights have another hash")
    n_blocks = manifest["configuration"]["blocks"]
    content = content_of(config, model.linear_shapes(), len(model.blocks), model.config.model_type)
    check_format(config, content)

    def replaced(index: int) -> Mapping[str, Any]:
        if index >= n_blocks:
            return {}
        solved = {f"{name}.weight": weight for name, weight in run.read_weights(index).items()}
        return run.read_changed(index) | solved

    stream = packed_entries(entries(model, replaced), kind, content, model.storage_dtype)
    described = model_config(model, kind, content, n_blocks)
    tokenizer = load_tokenizer(model.checkpoint.path)
    save_checkpoint(stream, target, described, model_side_files(model, tokenizer), results | {"format": kind})
    return content


def _convert_checkpoint(source: Path, kind: str, target: Path) -> Content:
    declared: dict[str, Any] = json.loads((source / "config.json").read_text())
    if not declared.get("quantization_config"):
        raise InputError(f"{source} is a plain checkpoint: there are no codes to convert; quantize it")
    checkpoint = QuantizedCheckpoint(source)
    content = checkpoint.content()
    if kind in PACKED and (refusal := PACKED[kind].refuses(content)):
        raise InputError(refusal)
    quantization = declared.pop("quantization_config")
    if kind in PACKED:
        left = [n for n in quantization.get("ignore", ["lm_head"]) if not n.startswith("re:")]
        declared["quantization_config"] = PACKED[kind].config(content, Layers(checkpoint.linears, left, "", 0))
    stream = packed_entries(checkpoint.entries(), kind, content, checkpoint.dtype)

    def side_files(directory: Path) -> None:
        for pattern in SIDE_FILES:
            for file in source.glob(pattern):
                shutil.copy(file, directory)

    old = source / "results.json"
    results = json.loads(old.read_text()) if old.exists() else {}
    save_checkpoint(stream, target, declared, side_files, results | {"format": kind})
    return content


def same_codes(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    """Whether two answers hold the same codes, scales, zero points, groups and outliers."""
    pairs = [(first.codes, second.codes), (first.grid.scale, second.grid.scale), (first.grid.zero, second.grid.zero),
             (first.grid.g_idx, second.grid.g_idx)]  # fmt: skip
    if (first.outliers is None) != (second.outliers is None):
        return False
    if first.outliers is not None and second.outliers is not None:
        pairs += [(first.outliers.index, second.outliers.index), (first.outliers.value, second.outliers.value)]
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)
