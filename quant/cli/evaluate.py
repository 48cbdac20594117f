"""python -m quant evaluate: measure a checkpoint with the protocol of the runs."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure a checkpoint with the protocol of the runs."""
    from data.corpora import KNOWN, check_source
    from quant.cli.errors import set_logging
    from quant.cli.flags import DEFAULT_CACHE, add_data_flags, add_machine_flags
    from quant.cli.parser import Parser
    from quant.core.errors import InputError

    parser: Any = Parser(prog="python -m quant evaluate", description=main.__doc__)
    parser.add_argument("--model", required=True, metavar="ID|DIR", help="hub id or directory, also one of --save")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    group = add_data_flags(parser, seed=0)
    group.add_argument("--real_quant", action="store_true", help="keep a quantized checkpoint packed in memory")
    group.add_argument("--limit", type=int, metavar="N", help="the first N windows and items only")
    add_machine_flags(parser, DEFAULT_CACHE)
    args = parser.parse_args()
    set_logging("warning")
    corpora = tuple(d for d in args.eval_datasets.split(",") if d)
    mistakes = [
        f"--{name.replace('_', '-')} {value}: use {least} or more"
        for name, least in (("limit", 1), ("seqlen", 2), ("calib_batch", 1))
        if (value := getattr(args, name)) is not None and value < least
    ]
    mistakes += [
        f"--{name.replace('_', '-')} {path} is not a directory"
        for name in ("task_path", "data_dir")
        if (path := getattr(args, name)) is not None and not path.is_dir()
    ]
    if mistakes:
        raise InputError(*mistakes)
    for source in corpora:
        check_source(source, KNOWN)
    evaluate(args, corpora)


def evaluate(args: argparse.Namespace, corpora: tuple[str, ...]) -> None:
    """Measure; show the numbers and write them."""
    from quant.cli.console import ProgressBars
    from quant.cli.console import console as make_console
    from quant.cli.tables import results_table, tasks_table
    from quant.core.files import check_owned, write_owned
    from quant.core.places import Place, check_places
    from quant.run.config import RunConfig, places_read
    from quant.run.session import Session

    with tempfile.TemporaryDirectory() as directory:
        config = RunConfig(
            model=args.model,
            eval_datasets=corpora,
            seqlen=args.seqlen,
            limit=args.limit,
            tasks=tuple(t for t in args.tasks.split(",") if t),
            task_path=args.task_path,
            num_fewshot=args.num_fewshot,
            data_dir=args.data_dir,
            cache_dir=args.cache_dir,
            device=args.device,
            dtype=args.dtype,
            calib_batch=args.calib_batch,
            activation_store=args.activation_store,
            trust_remote_code=args.trust_remote_code,
            packed=args.real_quant,
            deterministic=args.deterministic,
            run_dir=Path(directory) / "run",
        )
        if args.out is not None:
            check_places(places_read(config), [Place("--out", args.out), Place("--cache-dir", args.cache_dir)])
            check_owned(args.out)
        console = make_console()
        with ProgressBars(console) as bars:
            results = Session(config).run(config, bars.for_method("base"))
    console.print(results_table([results], args.model))
    if results["zero_shot"]:
        console.print(tasks_table([results]))
    if args.out is not None:
        kept = ("perplexity", "zero_shot", "evaluation")
        numbers = {"model": args.model} | {key: results[key] for key in kept}
        write_owned(args.out.parent, {args.out.name: (json.dumps(numbers, indent=2) + "\n").encode()})
