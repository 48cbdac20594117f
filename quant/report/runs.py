"""Finished runs as they lie on disk: opened, named and scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.core.errors import InputError
from quant.core.text import brief
from quant.report.published import method_of
from quant.run.directory import RunDirectory
from quant.run.finished import JournalLine, Manifest, Results, Score, read_journal, read_manifest, read_results

# What a request may ask for besides a method, widths and groups; of runs of one method, what differs is named.
ASKED = ("dataset", "nsamples", "seqlen", "symmetric", "range", "levels", "grid_kind", "true_sequential", "target_correction", "residual_correction", "saliency",
         "bias_correction", "column_scales", "rotation", "tuning", "learning", "head_bits", "embedding_bits")  # fmt: skip
EXPERT = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")  # the number of an expert in the name of one of its linears


def of_all_experts(name: str) -> str:
    """The name that an expert's linear shares with those of the other experts; any other linear's own."""
    return EXPERT.sub("#", name)


def by_line(records: Sequence[JournalLine]) -> dict[tuple[int, str], list[JournalLine]]:
    """Records by block and by what a table has a line for: a linear, or those of all experts of a block that share a name."""
    lines: dict[tuple[int, str], list[JournalLine]] = {}
    for record in records:
        lines.setdefault((record["block"], of_all_experts(record["name"])), []).append(record)
    return lines


@dataclass(frozen=True)
class Run:
    """A finished run as it lies on disk. named: what tables call it, if not by its method."""

    path: Path
    manifest: Manifest
    results: Results
    records: list[JournalLine]
    named: str = ""

    @property
    def model(self) -> str:
        """Last part of the model's name."""
        return Path(self.manifest["model"]["id"]).name

    @property
    def method(self) -> str:
        """The method, with what sets the run apart from others of it."""
        return self.named or method_of(self.results)

    @property
    def label(self) -> str:
        """Method with its width."""
        r = self.results
        acts = f"A{r['abits']}" if (r["abits"] or 16) < 16 else ""
        group = f" g{r['group_size']}" if r["group_size"] > 0 else ""
        width = f"{r['avg_bits']:g} mixed" if r["avg_bits"] else r["wbits"]
        return f"{self.method} W{width}{acts}{group}"

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that was held, on the host or on a device."""
        peak = self.results["peak_bytes"]
        return max((held for held in (peak["host"], peak["device"]) if held is not None), default=None)


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same runs. Those of one method that were asked for differently say how, where nobody has said it: a picture has one line
    and a table one name for what is of one name."""
    if any(run.named for run in runs):
        return list(runs)
    asked = {id(run): _asked(run.manifest["request"]) for run in runs}
    named = []
    for run in runs:
        others = [asked[id(other)] for other in runs if other.method == run.method]
        own = [word for key, word in asked[id(run)].items() if word and any(other.get(key) != word for other in others)]
        named.append(replace(run, named=", ".join([run.method, *own])))
    return named


def _asked(request: Mapping[str, Any]) -> dict[str, str]:
    """A request's flags in words; those that are off have none."""
    flags = _flat({key: request.get(key) for key in ASKED}) | _flat(
        request["options"] if isinstance(request.get("options"), dict) else {}
    )
    words = {}
    for key, value in flags.items():
        name = brief(key.replace("_", "-"), 30)
        said = f"{value:g}" if isinstance(value, float) else str(value)
        words[key] = "" if not value else name if value is True else f"{name} {brief(said, 20)}"
    return words


def _flat(flags: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flags inside of flags under the names of both."""
    flat: dict[str, Any] = {}
    for key, value in flags.items():
        flat |= _flat(value, f"{before}{key} ") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def open_run(path: Path) -> Run:
    """A run directory. Raises InputError where it is none, is not finished, or is damaged."""
    directory = RunDirectory(path)
    manifest = read_manifest(directory) if path.is_dir() else None
    if manifest is None:
        raise InputError(f"{path} is not a run directory (it has no manifest.json)")
    results = read_results(directory)
    if results is None:
        done = len(list((path / "blocks").glob("*.safetensors")))
        asked = manifest["configuration"].get("blocks", "?")
        raise InputError(
            f"{path} is not finished: {done} of {asked} blocks are there and no results; run its command again"
        )
    return Run(path, manifest, results, read_journal(directory))


def score_of(entry: Score) -> float | None:
    """A task's score: of the quantized model, or of full precision where that alone was measured."""
    return entry["quantized"] if entry["quantized"] is not None else entry["fp"]


def mean_of(numbers: Sequence[float | None]) -> float | None:
    """The mean, or None where there is no number or one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None
