"""A session: inputs that were opened once, and the runs that are made on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quant.run.config import RunConfig
from quant.run.directory import Record
from quant.run.identity import configuration_of, path_of
from quant.run.inputs import Inputs
from quant.run.job import Progress, silent
from quant.run.loop import compare_layers
from quant.run.run import quantize_only, run_all
from quant.run.scoring import FullPrecision

__all__ = ["FullPrecision", "Progress", "Session", "silent"]


class Session(Inputs):
    """Model, tokenizer and tokens, opened and checked once; ``run`` may then be called for several methods."""

    def configuration(self, config: RunConfig) -> Record:
        """What decides the codes: two runs with equal configurations on one machine give the same bits."""
        return configuration_of(self, config)

    def run_path(self, config: RunConfig) -> Path:
        """``--run-dir``, or a name under ``runs`` that the configuration decides."""
        return path_of(self, config)

    def run(self, config: RunConfig, progress: Progress = silent) -> Record:
        """Quantize, evaluate, save; return what results.json holds. Continues a run that was interrupted."""
        return self.run_all([config], lambda _: progress)[0]

    def run_all(
        self,
        configs: Sequence[RunConfig],
        progress: Callable[[str], Progress] = lambda _: silent,
        kept: FullPrecision | None = None,
    ) -> list[Record]:
        """`run` for several methods: all are quantized, then evaluated side by side, so full precision runs once.

        progress: gives the callback for a method's name. kept: what the session's earlier calls left of full precision;
        filled by the first.
        """
        return run_all(self, configs, progress, kept or FullPrecision())

    def quantize(self, config: RunConfig, progress: Progress = silent) -> None:
        """Quantize alone: every block is in the run directory afterwards, and ``run`` only evaluates."""
        quantize_only(self, config, progress)

    def compare_layers(self, configs: Sequence[RunConfig], progress: Progress = silent) -> list[Record]:
        """Journal records of every method for every linear; see `quant.run.loop.compare_layers`."""
        return compare_layers(self, configs, progress)
