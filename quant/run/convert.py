"""One set of codes in another format: from a run directory, or from a checkpoint, without rounding anything."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoint import RESULTS
from models.container import metadata_of
from models.load import LazyModel, load_model, load_tokenizer
from models.side_files import check_own
from models.unsupported import DIRECTORY, of_directory, of_file
from models.vocabulary import vocabulary_of
from quant.core.errors import InputError
from quant.core.files import check_space, json_sha256, read_json
from quant.core.names import DEFAULT_CACHE, GGUF
from quant.core.places import Place, check_places
from quant.export import refusal
from quant.export.carried import side_file_writer
from quant.export.formats import Content, Layers
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.export.target import check_target, settle
from quant.export.write import (
    Form,
    entries,
    form_of,
    gates_of,
    layers_of,
    linears_of,
    model_side_files,
    save_checkpoint,
    size_of,
)
from quant.run.config import Output
from quant.run.content import check_format, content_of
from quant.run.directory import OUTSIDE
from quant.run.packed_model import FinishedRun, is_run, open_run
from quant.run.request import cache_place
from quant.run.results import is_whole
from quant.run.save import replacements_in

log = logging.getLogger(__name__)
CONVERTED = "converted_sha256"  # entry of results.json: hash of what decides a conversion


@dataclass(frozen=True)
class Conversion:
    """A source that was opened and found to fit a format. form, results: of the checkpoint; digest: of what decides it;
    size: of its tensors, in bytes."""

    content: Content
    form: Form
    results: Mapping[str, Any]
    digest: str
    size: int


def convert(
    source: Path,
    kind: str,
    target: Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    cache_dir: Path = DEFAULT_CACHE,
    family: str | None = None,
) -> Content:
    """Write ``source`` in a format to ``target``; returns what it holds. What is there already, of this source in this
    format and whole, stays. family: what a checkpoint of an unknown model type is taken for; a run says it itself. Raises InputError where that cannot be."""
    check_places([Place("the source", source)], [Place("--out", target), cache_place(cache_dir)])
    if is_run(source):
        run = open_run(source, cache_dir, trust_remote_code=trust_remote_code)
        if (origin := Path(run.request.session.model)).exists():
            check_places([Place("the model of the run", origin)], [Place("--out", target)])
        conversion = _of_run(run, kind)
    elif (source / "config.json").exists():
        conversion = _of_checkpoint(source, kind, trust_remote_code, cache_dir, family)
    else:
        what = of_file(source) if source.is_file() else of_directory(source, "config.json")
        neither = f"{source} is neither a run directory (manifest.json) nor a checkpoint (config.json)"
        raise InputError(neither if DIRECTORY in what else what)
    settle(target)
    if overwrite or not is_whole(target, {CONVERTED: conversion.digest}):
        if others := check_target(target, overwrite):
            log.warning("%s: files of others stay: %s", target, ", ".join(file.name for file in others))
        check_space(target, conversion.size)
        results = dict(conversion.results) | {"format": kind, CONVERTED: conversion.digest}
        form = conversion.form
        save_checkpoint(form.tensors(), target, form.config, form.side_files, results, overwrite, form.writer_in)
    return conversion.content


def _of_run(run: FinishedRun, kind: str) -> Conversion:
    model, n_blocks = run.model, run.n_blocks
    asked = run.request.run
    ends = vocabulary_of(model.module) if asked.beyond_blocks else None
    content = content_of(asked, model.linear_shapes(), len(model.blocks), model.config.model_type, ends)
    check_format(Output(format=kind), content)
    tokenizer = load_tokenizer(model.checkpoint.path, run.request.session.trust_remote_code)
    replaced, layers = replacements_in(run.directory, n_blocks), layers_of(model, n_blocks, content)
    outside = run.directory.read_weights(OUTSIDE) if content.outside else None
    return Conversion(
        content,
        form_of(
            model,
            kind,
            content,
            layers,
            lambda: entries(model, replaced, outside),
            dtype_of=model.storage_of,
            layout=model.family.layout,
            side_files=model_side_files(model, tokenizer),
            tokenizer=tokenizer,
            results=run.results,
        ),
        run.results,
        json_sha256(
            {"run": run.results.get("configuration_sha256"), "codes": run.results.get("codes_sha256"), "to": kind}
        ),
        size_of(model, kind, content, layers),
    )


def _of_checkpoint(source: Path, kind: str, trust_remote_code: bool, cache_dir: Path, family: str | None) -> Conversion:
    declared = metadata_of(source)
    digest = {"config": json_sha256(declared), "to": kind}
    if not declared.get("quantization_config"):
        raise InputError(f"{source} is a plain checkpoint: there are no codes to convert; quantize it")
    model = load_model(str(source), dtype=None, cache_dir=cache_dir, opener=open_checkpoint,
                       trust_remote_code=trust_remote_code, family=family)  # fmt: skip
    checkpoint = model.checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    layers = _layers_in(model, checkpoint)
    whole = not any(name.startswith(f"{layers.blocks}.") for name in layers.untouched)
    content = checkpoint.content(model, whole)
    if against := refusal(kind, content):
        raise InputError(against)
    old = source / RESULTS
    if old.exists():
        check_own(old, source)
    results = read_json(old) if old.exists() else {}
    return Conversion(
        content,
        form_of(
            model,
            kind,
            content,
            layers,
            checkpoint.entries,
            dtype_of=checkpoint.dtype_of,
            layout=checkpoint.layout,
            side_files=side_file_writer(source, declared),
            tokenizer=load_tokenizer(source, trust_remote_code) if kind == GGUF else None,
            results=results,
        ),
        results,
        json_sha256(digest | {"weights": checkpoint.sha256()}),
        size_of(model, kind, content, layers),
    )


def _layers_in(model: LazyModel, checkpoint: QuantizedCheckpoint) -> Layers:
    """The linears of the module, by whether the checkpoint has them quantized. Raises InputError for quantized tensors
    that are no linear of it.
    """
    prefix, quantized = f"{model.module.base_model_prefix}.", set(checkpoint.linears)
    ends, linears = vocabulary_of(model.module), linears_of(model)
    spelt = {name: {name, name.removeprefix(prefix), prefix + name} & quantized for name in [*linears, ends.embedding]}
    if strange := quantized - set().union(*spelt.values()):
        raise InputError(f"{checkpoint.path}: {min(strange)} is quantized, but is no linear of the model")
    done = [name for name, held in spelt.items() if held]
    tied = {ends.head} if ends.tied and ends.embedding in done else set()
    rest = [name for name in linears if name not in {*done, *tied}]
    return Layers(done, rest, model.family.blocks, len(model.blocks), gates_of(model))
