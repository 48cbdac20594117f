"""The checkpoint of a finished job, from the codes in its run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from quant.blocks.linears import LinearRef
from quant.core import ranks
from quant.core.errors import InputError, RunError
from quant.core.types import QuantizedWeight
from quant.export.target import size_on_disk
from quant.export.write import entries, form_of, layers_of, model_side_files, save_checkpoint
from quant.run.directory import RunDirectory
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress, measure, write_results

log = logging.getLogger(__name__)


def save(inputs: Inputs, job: Job, progress: Progress) -> None:
    """Save the checkpoint if asked for, and say so in results.json; of several processes the first does, and all wait."""
    if job.output.save is not None:
        if ranks.is_first():
            _save(inputs, job, job.output.save, progress)
        ranks.barrier()


def _save(inputs: Inputs, job: Job, target: Path, progress: Progress) -> None:
    results = job.results
    assert results is not None
    if not job.is_saved():
        progress("save", 0, 1, str(target))
        with measure(inputs.device, [job], "export") as spent:
            _save_or_fall_back(inputs, job)
        results["seconds"] |= spent
        progress("save", 1, 1, str(target))
    size = size_on_disk(target)
    if size != results["checkpoint_bytes"]:
        results["checkpoint_bytes"] = size
        write_results(inputs, job)


def _save_or_fall_back(inputs: Inputs, job: Job) -> None:
    """The checkpoint in the format asked for, or else in the one named for that case. Raises RunError where the format
    turns out not to hold the codes."""
    output = job.output
    try:
        _save_in(inputs, job, output.format)
    except InputError as error:
        if output.fallback in (None, output.format):
            raise RunError(f"{error} ({job.target.path} holds codes and scores)") from error
        _save_in(inputs, job, str(output.fallback))
        log.warning("%s; saved as %s", error, output.fallback)


def replacements_in(directory: RunDirectory, n_blocks: int) -> Callable[[int], Mapping[str, Tensor | QuantizedWeight]]:
    """What the blocks of a run deploy otherwise than the original, by index; nothing for blocks that were left alone."""

    def replacements(index: int) -> Mapping[str, Tensor | QuantizedWeight]:
        if index >= n_blocks:
            return {}
        solved = {LinearRef.of_module(name).parameter: one for name, one in directory.read_weights(index).items()}
        return directory.read_changed(index).named() | solved

    return replacements


def _save_in(inputs: Inputs, job: Job, format_name: str) -> None:
    """The checkpoint in one format. Raises InputError where that does not hold the codes."""
    model, content, target = inputs.model, inputs.content(job.run), job.output.save
    assert target is not None
    replaced, results = replacements_in(job.target, job.n_blocks), dict(job.results or {}) | {"format": format_name}
    outside = job.solved_outside()
    form = form_of(
        model,
        format_name,
        content,
        layers_of(model, job.n_blocks, content),
        lambda: entries(model, replaced, outside),
        dtype_of=model.storage_of,
        layout=model.family.layout,
        side_files=model_side_files(model, inputs.tokenizer),
        tokenizer=inputs.tokenizer,
        results=results,
    )
    save_checkpoint(form.tensors(), target, form.config, form.side_files, results, job.output.overwrite, form.writer_in)
