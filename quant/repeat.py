"""Repeat a run from its manifest, and say whether the result is identical: python -m quant.repeat RUN."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.core.config import RunConfig
from quant.core.errors import InputError, RunError
from quant.core.journal import RunDirectory, check_manifest
from quant.core.places import Place, check_places
from quant.core.run import Session
from quant.core.stored import NOTHING_ALLOWED, Allowed

EXAMPLES = """examples:
  python -m quant.repeat runs/llama-gptq-w3-10556a3f
  python -m quant.repeat runs/llama-gptq-w3-10556a3f --into runs/again     # keep the second run

Exit codes: 0 identical, 1 different, 2 the run cannot be repeated.
"""
NUMBERS = ("codes_sha256", "bits_per_weight", "perplexity", "fidelity", "zero_shot", "mean_relative_error")


def repeat(
    run: Path, into: Path, allowed: Allowed = NOTHING_ALLOWED, cache_dir: Path = RunConfig.cache_dir
) -> list[str]:
    """Run the configuration of ``run`` again in ``into``; return a line for everything that differs.

    Raises InputError where the run is unfinished, or its model or data have changed, or where it asks for what
    ``allowed`` does not allow.
    """
    source = RunDirectory(run)
    manifest, before = source.read("manifest.json"), source.read("results.json")
    if manifest is None:
        raise InputError(f"{run} has no manifest that says what was asked for")
    check_manifest(manifest, run / "manifest.json")
    if before is None:
        raise InputError(f"{run} was not finished; run its command again first")
    config = RunConfig.from_json(manifest["request"], str(run / "manifest.json"), allowed)
    config = replace(config, run_dir=into, cache_dir=cache_dir)
    check_places([Place("the run", run)], [Place("--into", into)])
    session = Session(config)
    changed = [
        f"{key}: {manifest['configuration'].get(key)} -> {value}"
        for key, value in session.configuration(config).items()
        if manifest["configuration"].get(key) != value
    ]
    if changed:
        raise InputError(f"{run} cannot be repeated as it was: {'; '.join(changed)}")
    after = session.run(config)
    found = [
        f"block {index}: other codes"
        for index in range(manifest["configuration"]["blocks"])
        if _codes(source, index) != _codes(RunDirectory(into), index)
    ]
    return found + [f"{key}: {before[key]} -> {after[key]}" for key in NUMBERS if before[key] != after[key]]


def _codes(run: RunDirectory, index: int) -> str:
    """The hash of a block's codes, after they were read and found to have it."""
    run.read_weights(index)
    return run.read_summary(index).codes_sha256


def versions_that_differ(run: Path, into: Path) -> list[str]:
    """Packages, threads and hardware that are not those of the first run: where to look if results differ."""
    first, second = (RunDirectory(path).read("manifest.json") for path in (run, into))
    assert first is not None and second is not None
    return [
        f"{key} {first[part].get(key)} -> {second[part].get(key)}"
        for part in ("versions", "hardware")
        for key in first[part]
        if first[part].get(key) != second[part].get(key)
    ]


def main() -> None:
    """Parse, repeat, say."""
    from quant.core import cli

    parser: Any = cli.Parser(
        prog="python -m quant.repeat",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--into", type=Path, metavar="DIR", help="keep the second run here (default: it is deleted)")
    parser.add_argument(
        "--allow-paths",
        action="store_true",
        help="read the data, tasks and activation ranges that the manifest names by path: for runs of your own",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, if the run did"
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=RunConfig.cache_dir, help="of models and tokens (default: %(default)s)"
    )
    args = parser.parse_args()
    cli.set_logging("warning")
    if not args.run.is_dir():
        raise InputError(f"{args.run} is not a run directory")
    with tempfile.TemporaryDirectory() as temporary:
        into = args.into or Path(temporary) / "run"
        allowed = Allowed(args.trust_remote_code, args.allow_paths)
        found = repeat(args.run, into, allowed, args.cache_dir)
        others = versions_that_differ(args.run, into)
    console = cli.console()
    for line in others:
        console.print(f"note: {line}", highlight=False)
    if found:
        raise RunError(*(f"different: {line}" for line in found))
    console.print(f"identical: codes and numbers of {args.run}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from quant.core.cli import guarded

    sys.exit(guarded(main))
