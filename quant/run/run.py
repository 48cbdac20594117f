"""A run from configurations to results.json: check, quantize, score, write, save; all of it resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from quant.run.config import Output, RunConfig
from quant.run.directory import Record
from quant.run.importance import check_importance, keep_importance
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress, measure, open_jobs, write_results
from quant.run.loop import quantize
from quant.run.outside import quantize_outside
from quant.run.save import save
from quant.run.scoring import FullPrecision, score


def run_all(
    inputs: Inputs,
    runs: Sequence[tuple[RunConfig, Output]],
    progress: Callable[[str], Progress],
    full: FullPrecision,
) -> list[Record]:
    """Several runs on the same inputs; see `Session.run_all`."""
    for file in (output.imatrix for _, output in runs if output.imatrix is not None):
        check_importance(inputs, file)
    with ExitStack() as held:
        jobs = open_jobs(inputs, runs, held)
        for job in jobs:
            _quantize(inputs, job, progress(job.run.method))
            if job.output.imatrix is not None:
                keep_importance(inputs, job.run, job.output.imatrix, progress(job.run.method))
        waiting = [job for job in jobs if job.results is None]
        score(inputs, waiting, progress(waiting[0].run.method if len(waiting) == 1 else "all"), full)
        for job in waiting:
            write_results(inputs, job)  # before anything is saved: where that fails, no score is lost
        for job in jobs:
            save(inputs, job, progress(job.run.method))
        return [(job.results or {}) | {"run_dir": str(job.target.path)} for job in jobs]


def quantize_only(inputs: Inputs, run: RunConfig, output: Output, progress: Progress) -> None:
    """Every block is in the run directory afterwards; the run then only evaluates."""
    with ExitStack() as held:
        _quantize(inputs, open_jobs(inputs, [(run, output)], held)[0], progress)


def _quantize(inputs: Inputs, job: Job, progress: Progress) -> None:
    """The blocks, then what is asked for outside of them."""
    quantize(inputs, job, progress)
    if job.run.beyond_blocks:
        with measure(inputs.device, [job], "head") as spent:
            job.outside = quantize_outside(inputs, job, progress)
        job.seconds += spent["head"]
