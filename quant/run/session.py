"""A session: inputs that were opened once, and the runs that are made on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quant.core.places import check_places
from quant.run.config import Output, RunConfig
from quant.run.directory import Record
from quant.run.identity import configuration_of, path_of
from quant.run.inputs import Inputs
from quant.run.job import Progress, silent
from quant.run.loop import compare_layers
from quant.run.request import Request, cache_place, places_read, places_written
from quant.run.run import quantize_only, run_all
from quant.run.scoring import FullPrecision


class Session(Inputs):
    """Model, tokenizer and tokens, opened and checked once; ``run`` may then be called for several runs."""

    def configuration(self, run: RunConfig) -> Record:
        """What decides the codes: two runs with equal configurations on one machine give the same bits."""
        return configuration_of(self, run)

    def run_path(self, run: RunConfig, output: Output) -> Path:
        """``--run-dir``, or a name under ``runs`` that the configuration decides."""
        return path_of(self, run, output)

    def run(self, run: RunConfig, output: Output, progress: Progress = silent) -> Record:
        """Quantize, evaluate, save; return what results.json holds. Continues a run that was interrupted."""
        return self.run_all([(run, output)], lambda _: progress)[0]

    def run_all(
        self,
        runs: Sequence[tuple[RunConfig, Output]],
        progress: Callable[[str], Progress] = lambda _: silent,
        kept: FullPrecision | None = None,
    ) -> list[Record]:
        """`run` for several: all are quantized, then evaluated side by side, so full precision runs once.

        progress: gives the callback for a method's name. kept: what the session's earlier calls left of full precision;
        filled by the first.
        """
        return run_all(self, runs, progress, kept or FullPrecision())

    def quantize(self, run: RunConfig, output: Output, progress: Progress = silent) -> None:
        """Quantize alone: every block is in the run directory afterwards, and ``run`` only evaluates."""
        quantize_only(self, run, output, progress)

    def compare_layers(self, runs: Sequence[RunConfig], progress: Progress = silent) -> list[Record]:
        """Journal records of every run for every linear; see `quant.run.loop.compare_layers`."""
        return compare_layers(self, runs, progress)


def open_session(*requests: Request) -> Session:
    """The session of requests that share what is opened; where they read and write is checked first. Raises ValueError
    for requests that do not share it."""
    first = requests[0].session
    if any(request.session != first for request in requests):
        raise ValueError("these requests are not of one session")
    written = [place for request in requests for place in places_written(request.output)]
    reads = places_read(first, [request.run for request in requests])
    check_places(reads, [*dict.fromkeys(written), cache_place(first.cache_dir)])
    return Session(first)
