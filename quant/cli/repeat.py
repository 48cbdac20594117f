"""python -m quant repeat: run a finished run again from its manifest."""

from __future__ import annotations

import tempfile
from pathlib import Path

from quant.cli.arguments import add_flags, bare_parser, flag_mistakes, parse
from quant.cli.flags import REPEAT
from quant.core.errors import InputError, RunError

EXAMPLES = """examples:
  python -m quant repeat runs/llama-gptq-w3-10556a3f
  python -m quant repeat runs/llama-gptq-w3-10556a3f --into runs/again     # keep the second run

Exit codes: 0 identical, 1 different, 2 the run cannot be repeated.
"""


def main() -> None:
    """Parse, repeat, say."""
    parser = bare_parser(REPEAT, __doc__, EXAMPLES)
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--into", type=Path, metavar="DIR", help="keep the second run here (default: it is deleted)")
    parser.add_argument(
        "--allow-paths",
        action="store_true",
        help="read the data, tasks and activation ranges that the manifest names by path: for runs of your own",
    )
    add_flags(parser, REPEAT)
    args = parse(parser)
    if lines := flag_mistakes(args, REPEAT):
        raise InputError(*lines)
    if not args.run.is_dir():
        raise InputError(f"{args.run} is not a run directory")
    from quant.cli.console import console as make_console
    from quant.run.repeat import repeat, versions_that_differ
    from quant.run.stored import Allowed

    with tempfile.TemporaryDirectory() as temporary:
        into = args.into or Path(temporary) / "run"
        allowed = Allowed(args.trust_remote_code, args.allow_paths)
        differences = repeat(args.run, into, allowed, args.cache_dir)
        others = versions_that_differ(args.run, into)
    console = make_console()
    for line in others:
        console.print(f"note: {line}")
    if differences:
        raise RunError(*(f"different: {line}" for line in differences))
    console.print(f"identical: codes and numbers of {args.run}", soft_wrap=True)
