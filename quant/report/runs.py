"""Finished runs as they lie on disk: opened, named and scored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from quant.core.errors import InputError
from quant.core.files import check_plain_file
from quant.report.published import method_of
from quant.run.directory import Record, RunDirectory, check_manifest


@dataclass(frozen=True)
class Run:
    """A finished run as it lies on disk."""

    path: Path
    manifest: Record
    results: Record
    records: list[Record]

    @property
    def model(self) -> str:
        """Last part of the model's name."""
        return Path(self.manifest["model"]["id"]).name

    @property
    def label(self) -> str:
        """Method with its width."""
        r = self.results
        acts = f"A{r['abits']}" if r.get("abits", 16) < 16 else ""
        group = f" g{r['group_size']}" if r["group_size"] > 0 else ""
        return f"{method_of(r)} W{r['wbits']}{acts}{group}"

    @property
    def score(self) -> float | None:
        """Mean score over its tasks, of the quantized model where there is one; None without tasks."""
        scores = [score_of(entry) for entry in self.results["zero_shot"].values()]
        return sum(scores) / len(scores) if scores else None


def open_run(path: Path) -> Run:
    """A run directory. Raises InputError where it is none, is not finished, or is damaged."""
    directory = RunDirectory(path)
    manifest = directory.read("manifest.json") if path.is_dir() else None
    if manifest is None:
        raise InputError(f"{path} is not a run directory (it has no manifest.json)")
    check_manifest(manifest, path / "manifest.json")
    results = directory.read("results.json")
    if results is None:
        done = len(list((path / "blocks").glob("*.safetensors")))
        asked = manifest["configuration"].get("blocks", "?")
        raise InputError(
            f"{path} is not finished: {done} of {asked} blocks are there and no results; run its command again"
        )
    journal = path / "journal.jsonl"
    check_plain_file(journal)
    try:
        records = [json.loads(line) for line in journal.open()] if journal.exists() else []
    except json.JSONDecodeError as error:
        raise InputError(f"{journal}, line {error.lineno}: damaged; run the command again to rebuild it") from error
    return Run(path, manifest, results, records)


def score_of(entry: Record) -> float:
    """A task's score: of the quantized model, or of full precision where that alone was measured."""
    value: float = entry["quantized"] if entry["quantized"] is not None else entry["fp"]
    return value
