"""Repeat a run from its manifest, and say whether the result is identical."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.core.errors import InputError
from quant.core.names import DEFAULT_CACHE
from quant.core.places import Place, check_places
from quant.run.directory import OUTSIDE, RunDirectory, Which
from quant.run.finished import read_manifest, read_results
from quant.run.request import Request
from quant.run.session import open_session
from quant.run.stored import NOTHING_ALLOWED, Allowed

NUMBERS = ("codes_sha256", "bits_per_weight", "perplexity", "fidelity", "zero_shot", "mean_relative_error")


def repeat(run: Path, into: Path, allowed: Allowed = NOTHING_ALLOWED, cache_dir: Path = DEFAULT_CACHE) -> list[str]:
    """Run the configuration of ``run`` again in ``into``; return a line for everything that differs.

    Raises InputError where the run is unfinished, or its model or data have changed, or where it asks for what
    ``allowed`` does not allow.
    """
    source = RunDirectory(run)
    manifest, before = read_manifest(source), read_results(source)
    if manifest is None:
        raise InputError(f"{run} has no manifest that says what was asked for")
    if before is None:
        raise InputError(f"{run} was not finished; run its command again first")
    request = Request.from_json(manifest["request"], str(run / "manifest.json"), allowed)
    request = request.but(run_dir=into, cache_dir=cache_dir)
    check_places([Place("the run", run)], [Place("--into", into)])
    session = open_session(request)
    configuration = session.configuration(request.run)
    changed = [
        f"{key}: {manifest['configuration'].get(key)} -> {value}"
        for key, value in configuration.items()
        if manifest["configuration"].get(key) != value
    ]
    if changed:
        raise InputError(f"{run} cannot be repeated as it was: {'; '.join(changed)}")
    after = session.run(request.run, request.output)
    parts: list[Which] = [*range(configuration["blocks"]), *([OUTSIDE] if request.run.beyond_blocks else [])]
    differences = [
        f"{index if index == OUTSIDE else f'block {index}'}: other codes"
        for index in parts
        if _codes(source, index) != _codes(RunDirectory(into), index)
    ]
    return differences + [
        f"{key}: {value} -> {after[key]}"
        for key, value in before.items()
        if key in NUMBERS and value not in (None, after[key])
    ]


def _codes(run: RunDirectory, index: Which) -> str:
    """The hash of a block's codes, after they were read and found to have it."""
    run.read_weights(index)
    return run.read_summary(index).codes_sha256


def versions_that_differ(run: Path, into: Path) -> list[str]:
    """Packages, threads, hardware and ways of packed products that are not those of the first run: where to look if results
    differ."""
    first, second = (read_manifest(RunDirectory(path)) for path in (run, into))
    assert first is not None and second is not None
    parts: list[tuple[Mapping[str, Any], ...]] = [
        (first["versions"], second["versions"]),
        (first["hardware"], second["hardware"]),
        ({key: way for key, way in first["products"].items() if key in second["products"]}, second["products"]),
    ]
    return [
        f"{key} {value} -> {now.get(key)}"
        for before, now in parts
        for key, value in before.items()
        if value != now.get(key)
    ]
