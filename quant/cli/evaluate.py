"""python -m quant evaluate: measure a checkpoint with the protocol of the runs."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quant.cli.arguments import build_parser, flag_mistakes, parse, source_mistakes, values_of
from quant.cli.flags import EVALUATE
from quant.core.errors import InputError


def main() -> None:
    """Measure a checkpoint with the protocol of the runs."""
    parser = build_parser(EVALUATE, main.__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parse(parser)
    values = values_of(args, EVALUATE) | {"full_precision_eval": True}
    if lines := flag_mistakes(args, EVALUATE) + source_mistakes(values["eval_datasets"], None):
        raise InputError(*lines)
    evaluate(args, values)


def evaluate(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Measure; show the numbers and write them."""
    from quant.cli.console import ProgressBars
    from quant.cli.console import console as make_console
    from quant.cli.tables import results_table, tasks_table
    from quant.core import ranks
    from quant.core.files import check_owned, write_owned
    from quant.core.places import Place, check_places
    from quant.run.request import Request, cache_place, places_read
    from quant.run.session import open_session

    with tempfile.TemporaryDirectory() as directory:
        request = Request.of(**values, run_dir=Path(ranks.from_first(lambda: directory)) / "run")
        if args.out is not None:
            check_places(places_read(request.session), [Place("--out", args.out), cache_place(args.cache_dir)])
            check_owned(args.out)
        console = make_console()
        with ProgressBars(console) as bars:
            results = open_session(request).run(request.run, request.output, bars.for_method("base"))
    console.print(results_table([results], args.model))
    if results["zero_shot"]:
        console.print(tasks_table([results]))
    if args.out is not None and ranks.is_first():
        kept = ("perplexity", "zero_shot", "evaluation")
        numbers = {"model": args.model} | {key: results[key] for key in kept}
        write_owned(args.out.parent, {args.out.name: (json.dumps(numbers, indent=2) + "\n").encode()})
