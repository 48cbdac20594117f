"""python -m quant convert: the codes of a run or a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

from quant.cli.arguments import add_flags, bare_parser, flag_mistakes, parse
from quant.cli.flags import CONVERT
from quant.core.errors import InputError
from quant.core.names import FORMATS

EXAMPLES = """examples:
  python -m quant convert runs/llama-gptq-w4g32-1a2b3c4d --to gptq --out llama-w4
  python -m quant convert llama-w4 --to compressed-tensors --out llama-w4-ct
"""


def main() -> None:
    """Parse, convert, say who loads it."""
    parser = bare_parser(CONVERT, __doc__, EXAMPLES)
    parser.add_argument("source", type=Path, help="a run directory or a quantized checkpoint")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_flags(parser, CONVERT)
    args = parse(parser)
    if lines := flag_mistakes(args, CONVERT):
        raise InputError(*lines)
    from quant.cli.console import console as make_console
    from quant.cli.tables import loadability_table
    from quant.export.runtimes import loadability
    from quant.export.target import size_on_disk
    from quant.run.convert import convert

    content = convert(
        args.source, args.to, args.out, args.overwrite, args.trust_remote_code, args.cache_dir, args.family
    )
    console = make_console()
    console.print(loadability_table(args.to, loadability(args.to, content)))
    console.print(f"{args.out}: {size_on_disk(args.out) / 1e6:.1f} MB", soft_wrap=True)
