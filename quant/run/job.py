"""One configuration on its way to results.json, checked as a whole before any work begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quant.core import env, ranks
from quant.core.errors import InputError
from quant.core.files import check_space, json_sha256, write_json
from quant.core.names import BLOCK_STAGES
from quant.core.places import check_places
from quant.core.types import QuantizedWeight
from quant.export.carried import names_written
from quant.export.target import check_names, check_target, settle
from quant.kernels.matmul.choice import described
from quant.run.config import Output, RunConfig
from quant.run.directory import OUTSIDE, ROTATION, BlockSummary, Record, RunDirectory, Which
from quant.run.finished import read_results
from quant.run.identity import configuration_of, evaluation_of, path_of
from quant.run.inputs import Inputs
from quant.run.request import Request, cache_place, places_read, places_written
from quant.run.results import is_saved, manifest_of
from quant.run.resume import check_ranges
from quant.run.rotating import keep_rotation
from quant.run.sharing import check_sharing
from quant.run.solving import Recipe

Progress = Callable[[str, int, int, str], None]  # stage, done, total, note
log = logging.getLogger(__name__)


def silent(stage: str, done: int, total: int, note: str) -> None:
    """Progress that nobody watches."""


@dataclass
class Job:
    """One run on its way: what was decided before work began, and what became of it."""

    run: RunConfig
    output: Output
    recipe: Recipe | None
    target: RunDirectory
    digest: str
    n_blocks: int
    results: Record | None
    blocks: list[BlockSummary] = field(default_factory=list)
    seconds: float = 0.0
    peaks: dict[str, Mapping[str, int]] = field(default_factory=dict)  # bytes by stage
    packed_bytes: dict[Which, int] = field(default_factory=dict)  # by block, where it was evaluated packed
    outside: BlockSummary | None = None  # of head and embedding, where they are quantized

    def tunes(self, scope: str) -> bool:
        """Whether what was solved is tuned in that scope."""
        return self.recipe is not None and self.run.tuning is not None and self.run.tuning.scope == scope

    def solved_outside(self) -> dict[str, QuantizedWeight]:
        """What is quantized outside the blocks, by module, from the run directory."""
        return self.target.read_weights(OUTSIDE) if self.run.beyond_blocks else {}

    def is_saved(self) -> bool:
        """Whether its checkpoint is where it belongs, whole, and may stay."""
        output = self.output
        formats = (output.format,) if output.fallback is None else (output.format, output.fallback)
        assert output.save is not None
        return not output.overwrite and is_saved(output.save, self.digest, formats)


def open_jobs(inputs: Inputs, runs: Sequence[tuple[RunConfig, Output]], held: ExitStack) -> list[Job]:
    """Everything that can be wrong with runs, before any work; their directories are opened, and no other process's
    until ``held`` ends."""
    written = [place for run, output in runs for place in places_written(output, path_of(inputs, run, output))]
    reads = places_read(inputs.config, [run for run, _ in runs])
    check_places(reads, [*dict.fromkeys(written), cache_place(inputs.config.cache_dir)])
    return [_open_job(inputs, run, output, held, len(runs)) for run, output in runs]


def _open_job(inputs: Inputs, run: RunConfig, output: Output, held: ExitStack, together: int) -> Job:
    check_sharing(run, ranks.size())
    recipe = inputs.recipe(run) if run.quantizes else None
    if run.learning is not None:
        check_ranges(run, inputs.model, inputs.model_sha256)
    configuration = configuration_of(inputs, run)
    _check_same(configuration)
    target = RunDirectory(path_of(inputs, run, output))
    previous = ranks.from_first(lambda: _previous(inputs, output, target))
    job = Job(run, output, recipe, target, json_sha256(configuration), configuration["blocks"], previous)
    inputs.check_export(run, output)
    stay = [Path(name) for name in ranks.from_first(lambda: list(map(str, _check_save(inputs, job))))]
    calibration = inputs.calibration(run) if run.quantizes else None
    _check_space(inputs, job, 0 if calibration is None else calibration.ids.numel(), together)
    request = Request(inputs.config, run, output)
    evaluated = inputs.evaluation.values()
    manifest = manifest_of(request, configuration, inputs.model, inputs.device, calibration, evaluated)
    held.enter_context(target.hold())
    others = target.open(manifest, output.overwrite)
    if ranks.is_first():
        keep_rotation(target.path / ROTATION, inputs.rotation)
    stay += others if output.overwrite else []
    if stay:
        log.warning("these are not of a run or checkpoint of this toolkit and stay: %s", ", ".join(map(str, stay)))
    return job


def _check_same(configuration: Record) -> None:
    """Raise InputError where processes of one job have opened other files or devices."""
    for number, other in enumerate(ranks.all_told(configuration)):
        if changed := [key for key, value in configuration.items() if other.get(key) != value]:
            raise InputError(
                f"process {number} of the job has another {changed[0]} ({other.get(changed[0])}) than process {ranks.rank()} "
                f"({configuration[changed[0]]}): give all machines the same files, and devices of one kind"
            )


def _previous(inputs: Inputs, output: Output, target: RunDirectory) -> Record | None:
    """The results that are there already, as they stand there, without entries that they lack; None where there are none of
    the evaluation that is asked for."""
    stored = None if output.overwrite else read_results(target)
    same = stored is not None and stored["evaluation"] == evaluation_of(inputs, output)
    return target.read("results.json") if same else None


def _check_save(inputs: Inputs, job: Job) -> list[Path]:
    """Raise InputError where the checkpoint cannot be written to its place; returns files of others that stay there."""
    save = job.output.save
    if save is None:
        return []
    settle(save)
    if job.is_saved():
        return []
    model = inputs.model
    names = names_written(model.checkpoint.path, model.config.to_dict())  # raises for files that must not be copied
    others = check_target(save, job.output.overwrite)
    check_names(names, others)
    return others


def _check_space(inputs: Inputs, job: Job, tokens: int, together: int) -> None:
    """Raise InputError where the blocks, and the checkpoint if asked for, cannot fit on the disk. tokens: of calibration;
    together: how many runs are evaluated at a time."""
    shapes = (inputs.model.linear_shapes(index) for index in range(job.n_blocks))
    need = sum(out * n_in for own in shapes for out, n_in in own.values())
    if job.run.beyond_blocks:
        need += sum(matrix.shape[0] * matrix.shape[1] for matrix in inputs.content(job.run).outside.values())
    if inputs.config.activation_store == "disk":  # those of calibration, then of full precision and the runs with it
        evaluated = sum(corpus.ids.numel() for corpus in inputs.evaluation.values())
        width = inputs.model.config.hidden_size * inputs.model.dtype.itemsize
        need += width * max(tokens * job.run.hidden_states(len(inputs.model.blocks)), evaluated * (1 + together))
    weights = sum(file.stat().st_size for file in inputs.model.checkpoint.files)
    for place, size in ((job.target.path, need), (job.output.save, weights)):
        if place is not None:
            check_space(place, size)


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
    """results.json, with the seconds and the peak memory of all stages so far; in the manifest, how packed products were taken,
    which is known after them alone."""
    assert job.results is not None
    seconds = job.results["seconds"] | {"load": inputs.load_seconds}
    blocks = sum(seconds.get(stage, 0.0) for stage in BLOCK_STAGES)  # of earlier processes too
    after = sum(seconds.get(k, 0.0) for k in ("evaluate", "tasks", "export"))
    seconds["total"] = inputs.load_seconds + max(job.seconds, blocks) + after
    stages = job.results.get("peak_bytes_by_stage", {}) | {"load": inputs.load_peak} | job.peaks
    highest = {where: max(peak[where] for peak in stages.values()) for where in ("device", "host")}
    job.results |= {"seconds": seconds, "peak_bytes": highest, "peak_bytes_by_stage": stages}
    if ranks.is_first():
        write_json(job.target.path / "results.json", job.results)
        if job.output.packed and (products := described()):
            job.target.add_to_manifest({"products": products})
