"""Finished runs as others read them: every entry of manifest.json, results.json and the journal has its type.

Whoever reads a run of before (reports, comparisons, repetitions) reads it here. What a version before did not write is None
or empty; what is missing although every version wrote it, or is of another type, is one line that names file and entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypedDict

from quant.core.entries import Measured, entries_as
from quant.core.errors import InputError, first_line
from quant.core.files import check_plain_file
from quant.run.directory import RunDirectory, check_manifest


class ModelEntry(TypedDict):
    """The model of a run."""

    id: str
    sha256: str
    model_type: str | None


class CalibrationEntry(TypedDict):
    """The text that a run was calibrated on."""

    name: str | None
    protocol: str | None
    shape: list[int]


class HardwareEntry(TypedDict):
    """The machine of a run."""

    device: str | None
    deterministic: bool | None


class Manifest(TypedDict):
    """manifest.json: what was asked for, and on what it runs."""

    model: ModelEntry
    seed: int | None
    created: str | None
    calibration: CalibrationEntry | None
    configuration: dict[str, Any]
    request: dict[str, Any]
    versions: dict[str, Any]
    hardware: HardwareEntry
    products: dict[str, Any]


class Perplexity(TypedDict):
    """Perplexity on one corpus, of full precision and after quantization."""

    fp: Measured | None
    quantized: Measured | None
    seqlen: int | None
    ratio_ci95: tuple[Measured, Measured] | None


class Fidelity(TypedDict):
    """What is left of full precision's predictions on one corpus."""

    kl_divergence: Measured | None
    top1_agreement: float | None


class Score(TypedDict):
    """Scores of one task."""

    metric: str | None
    items: int | None
    fp: float | None
    quantized: float | None
    stderr: Measured | None
    difference: float | None
    difference_ci95: tuple[Measured, Measured] | None
    chance: float | None
    at_chance: bool | None


class LearningLog(TypedDict):
    """How learning of one block went."""

    loss_start: Measured
    loss_end: Measured
    losses: list[Measured | None]
    events: list[str]
    online_parameters: int | None
    online_flops: int | None


class Options(TypedDict):
    """Options of a solver that are part of its name in tables; only some solvers have them."""

    outlier: float | None
    structure_outlier: bool | None


class Verdicts(TypedDict):
    """How many linears have each verdict."""

    ok: int | None
    look: int | None
    bad: int | None


class PeakBytes(TypedDict):
    """Most memory that was held."""

    host: int | None
    device: int | None


class Evaluation(TypedDict):
    """What decides numbers once the codes are there."""

    limit: int | None


class Results(TypedDict):
    """results.json: what came of a run. seconds: by stage."""

    method: str
    solver: str | None
    options: dict[str, Any]
    wbits: int
    avg_bits: float | None
    abits: int | None
    group_size: int
    bits_per_weight: float
    model_bits_per_weight: float | None
    model_bytes: int | None
    head_bits: int | None
    embedding_bits: int | None
    outlier_share: float | None
    entropy_bits: float | None
    quantized_bytes: int | None
    packed_bytes: int | None
    codes_sha256: str
    mean_relative_error: Measured | None
    perplexity: dict[str, Perplexity]
    fidelity: dict[str, Fidelity]
    zero_shot: dict[str, Score]
    learning: list[LearningLog]
    verdicts: Verdicts
    seconds: dict[str, float]
    peak_bytes: PeakBytes
    peak_bytes_by_stage: dict[str, PeakBytes]
    evaluation: Evaluation


class JournalLine(TypedDict):
    """A line of the journal: one linear. input_rms: of its channels, median and largest. n_tokens: of calibration, that it saw.

    `LinearRecord` is what this version writes, and what it goes on from; this is what others may rely on in a line of any
    version, which is read entry by entry, so that an error names the one that is damaged.
    """

    block: int
    name: str
    method: str | None
    bits: int | None
    relative_error: Measured
    relative_error_rtn: Measured | None
    relative_error_heldout: Measured | None
    relative_error_rtn_heldout: Measured | None
    bits_per_weight: float | None
    verdict: Literal["ok", "look", "bad"] | None
    seconds: float | None
    peak_bytes: int | None
    input_rms: tuple[float, float] | None
    weight_peak: float | None
    outlier_share: float | None
    rank: int | None
    n_tokens: int | None


def read_manifest(directory: RunDirectory) -> Manifest | None:
    """manifest.json, or None where there is none. Raises InputError where no run wrote it."""
    entries, path = directory.read("manifest.json"), directory.path / "manifest.json"
    if entries is None:
        return None
    check_manifest(entries, path)
    return entries_as(Manifest, entries, str(path))


def read_results(directory: RunDirectory) -> Results | None:
    """results.json, or None for a run that is not finished. Raises InputError where an entry is of another type."""
    entries = directory.read("results.json")
    if entries is None:
        return None
    path = directory.path / "results.json"
    try:
        results = entries_as(Results, entries, str(path))
        entries_as(Options, results["options"], f"{path}, options")
        return results
    except InputError as error:
        raise InputError(f"{error}; delete the file and run the command again, which writes it anew") from error


def read_journal(directory: RunDirectory) -> list[JournalLine]:
    """The journal's lines; none without a journal. Raises InputError that names the first that is damaged."""
    path: Path = directory.path / "journal.jsonl"
    check_plain_file(path)
    records = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            records.append(entries_as(JournalLine, json.loads(line.decode()), f"{path}, line {number}"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, another type
            reason = (
                str(error) if isinstance(error, InputError) else f"{path}, line {number}: damaged ({first_line(error)})"
            )
            raise InputError(f"{reason}; run the command again, which rebuilds the journal") from error
    return records
