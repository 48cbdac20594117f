"""What both command lines do with requests: plan, compare or run them, and show what came of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from quant.cli.console import Console, ProgressBars
from quant.cli.console import console as make_console
from quant.cli.plan import show_plan
from quant.cli.tables import comparison_table, linears_table, loadability_table, show_finished
from quant.core import ranks
from quant.core.errors import InputError
from quant.core.files import check_owned, write_owned
from quant.export.runtimes import loadability
from quant.run.request import Request
from quant.run.session import Session, open_session
from quant.run.sharing import check_sharing

LAYERS = "layers.json"  # what --compare-layers leaves in --run-dir


def carry_out(args: argparse.Namespace, requests: Sequence[Request], bits: str, notes: Sequence[str]) -> None:
    """Run all requests, or with --dry-run show their plan. bits: for the title."""
    console = _console_with(notes)
    if args.dry_run:
        if ranks.is_first():
            show_plan(requests, console, args.world_size)
        return
    session, first = _open(requests), requests[0]
    if first.output.save is not None and first.run.quantizes:
        rows = loadability(first.output.format, session.content(first.run))
        console.print(loadability_table(first.output.format, rows))
    with ProgressBars(console) as bars:
        finished = session.run_all([(request.run, request.output) for request in requests], bars.for_method)
    if not ranks.is_first():
        return
    run = first.run
    data = f"calibration {run.dataset}, {run.windows} x {session.seqlen} tokens, seed {run.seed}"
    groups = f", groups of {run.group_size}" if run.group_size > 0 and run.quantizes else ""
    save = args.save if "save" in args else args.save_dir
    show_finished(args, f"{args.model}: {bits}{groups}; {data}", finished, args.run_dir, save, console)


def compare_layers(args: argparse.Namespace, requests: Sequence[Request], notes: Sequence[str]) -> None:
    """One row a method; with --compute-quantization-recon-error one a linear; all of it as JSON in --run-dir."""
    console = _console_with(notes)
    if ranks.size() > 1:
        raise InputError("--compare-layers: of one process: start it without torchrun")
    if args.run_dir is not None:
        check_owned(args.run_dir / LAYERS)
    session = _open(requests)
    with ProgressBars(console) as bars:
        records = session.compare_layers([request.run for request in requests], bars.for_method("layers"))
    console.print()
    console.print(comparison_table(records, f"{args.model}: {args.wbits} bits, layer by layer, {args.dataset}"))
    if args.compute_quantization_recon_error:
        console.print(linears_table(records))
    if args.run_dir is not None:
        write_owned(args.run_dir, {LAYERS: (json.dumps(records, indent=2) + "\n").encode()})
        console.print(f"  {args.run_dir / LAYERS}", soft_wrap=True)


def _console_with(notes: Sequence[str]) -> Console:
    """Standard output, after the notes."""
    console = make_console()
    for line in notes:
        console.print(f"note: {line}", soft_wrap=True)
    return console


def _open(requests: Sequence[Request]) -> Session:
    """The session of the requests, each of which was found to fit it. Of several processes the first opens it before the
    others, which find what it has put into the cache."""
    for request in requests:
        check_sharing(request.run, ranks.size())
    if not ranks.is_first():
        ranks.barrier()
    session = open_session(*requests)
    if ranks.is_first():
        ranks.barrier()
    for request in requests:
        if request.run.quantizes:
            session.recipe(request.run)
            session.check_export(request.run, request.output)
    return session
