"""One configuration on its way to results.json, checked as a whole before any work begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quant.core import env
from quant.core.files import check_space, json_sha256, write_json
from quant.core.places import check_places
from quant.export.target import check_target, settle
from quant.export.write import model_side_files
from quant.run.config import RunConfig, places_read, places_written, stores_of
from quant.run.directory import BlockSummary, Record, RunDirectory
from quant.run.finished import read_results
from quant.run.identity import configuration_of, evaluation_of, path_of
from quant.run.inputs import Inputs
from quant.run.quantize import Recipe
from quant.run.results import is_saved, manifest_of
from quant.run.resume import check_ranges

Progress = Callable[[str, int, int, str], None]  # stage, done, total, note
log = logging.getLogger(__name__)


def silent(stage: str, done: int, total: int, note: str) -> None:
    """Progress that nobody watches."""


@dataclass
class Job:
    """One configuration on its way: what was decided before work began, and what became of it."""

    config: RunConfig
    recipe: Recipe | None
    target: RunDirectory
    digest: str
    n_blocks: int
    results: Record | None
    blocks: list[BlockSummary] = field(default_factory=list)
    seconds: float = 0.0
    peaks: dict[str, Mapping[str, int]] = field(default_factory=dict)  # bytes by stage
    packed_bytes: dict[int, int] = field(default_factory=dict)  # by block, where it was evaluated packed

    def is_saved(self) -> bool:
        """Whether its checkpoint is where it belongs, whole, and may stay."""
        config = self.config
        formats = (config.format,) if config.fallback is None else (config.format, config.fallback)
        assert config.save is not None
        return not config.overwrite and is_saved(config.save, self.digest, formats)


def open_jobs(inputs: Inputs, configs: Sequence[RunConfig], held: ExitStack) -> list[Job]:
    """Everything that can be wrong with configurations, before any work; their directories are opened, and no other
    process's until ``held`` ends."""
    written = (place for config in configs for place in places_written(config, path_of(inputs, config)))
    check_places(places_read(inputs.config), list(dict.fromkeys(written)))
    return [_open_job(inputs, config, held, len(configs)) for config in configs]


def _open_job(inputs: Inputs, config: RunConfig, held: ExitStack, together: int) -> Job:
    recipe = inputs.recipe(config) if config.quantizes else None
    if config.learning is not None:
        check_ranges(config, inputs.model, inputs.model_sha256)
    configuration = configuration_of(inputs, config)
    target = RunDirectory(path_of(inputs, config))
    stored = None if config.overwrite else read_results(target)
    same = stored is not None and stored["evaluation"] == evaluation_of(inputs, config)
    previous = dict(stored) if stored is not None and same else None
    job = Job(config, recipe, target, json_sha256(configuration), configuration["blocks"], previous)
    inputs.check_export(config)
    stay = _check_save(inputs, job)
    _check_space(inputs, config, target.path, together)
    calibration, evaluated = inputs.calibration(config), inputs.evaluation.values()
    manifest = manifest_of(config, configuration, inputs.model, inputs.device, calibration, evaluated)
    held.enter_context(target.held())
    others = target.open(manifest, config.overwrite)
    stay += others if config.overwrite else []
    if stay:
        log.warning("these are not of a run or checkpoint of this toolkit and stay: %s", ", ".join(map(str, stay)))
    return job


def _check_save(inputs: Inputs, job: Job) -> list[Path]:
    """Raise InputError where the checkpoint cannot be written to its place; returns files of others that stay there."""
    config = job.config
    if config.save is None:
        return []
    settle(config.save)
    if job.is_saved():
        return []
    model_side_files(inputs.model, inputs.tokenizer)  # raises for files that must not be copied
    return check_target(config.save, config.overwrite)


def _check_space(inputs: Inputs, config: RunConfig, path: Path, together: int) -> None:
    """Raise InputError where the blocks, and the checkpoint if asked for, cannot fit on the disk."""
    per_block = sum(out * n_in for out, n_in in inputs.model.linear_shapes().values())
    need = per_block * inputs.n_blocks(config)
    need += _hidden_state_bytes(inputs, config, together) if config.activation_store == "disk" else 0
    weights = sum(file.stat().st_size for file in inputs.model.checkpoint.files)
    for place, size in ((path, need), (config.save, weights)):
        if place is not None:
            check_space(place, size)


def _hidden_state_bytes(inputs: Inputs, config: RunConfig, together: int) -> int:
    """Bytes of hidden states that are on the disk at a time where they are kept there: of calibration, then of full
    precision and the ``together`` runs that are evaluated with it."""
    width = inputs.model.config.hidden_size * inputs.model.dtype.itemsize
    calibration = inputs.calibration(config)
    tokens = 0 if calibration is None else calibration.ids.numel()
    evaluated = sum(corpus.ids.numel() for corpus in inputs.evaluation.values())
    return width * max(tokens * stores_of(config), evaluated * (1 + together))


@contextmanager
def measure(device: torch.device, jobs: Sequence[Job], stage: str) -> Iterator[dict[str, float]]:
    """Keep the peak memory of a stage with the jobs that share it; give a job's share of its seconds, once known."""
    seconds: dict[str, float] = {}
    env.reset_peak(device)
    started = time.perf_counter()
    yield seconds
    seconds[stage] = (time.perf_counter() - started) / max(1, len(jobs))
    for job in jobs:
        job.peaks[stage] = env.peak_bytes(device)


def write_results(inputs: Inputs, job: Job) -> None:
    """results.json, with the seconds and the peak memory of all stages so far."""
    assert job.results is not None
    seconds = job.results["seconds"] | {"load": inputs.load_seconds}
    blocks = sum(seconds[k] for k in ("forward", "gram", "solve", "learn"))  # of earlier processes too
    after = sum(seconds.get(k, 0.0) for k in ("evaluate", "tasks", "export"))
    seconds["total"] = inputs.load_seconds + max(job.seconds, blocks) + after
    stages = job.results.get("peak_bytes_by_stage", {}) | {"load": inputs.load_peak} | job.peaks
    highest = {where: max(peak[where] for peak in stages.values()) for where in ("device", "host")}
    job.results |= {"seconds": seconds, "peak_bytes": highest, "peak_bytes_by_stage": stages}
    write_json(job.target.path / "results.json", job.results)
