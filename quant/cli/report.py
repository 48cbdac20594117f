"""python -m quant report: a page of finished runs, or what differs between them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse, open, write or compare."""
    from quant.cli.arguments import add_flags, bare_parser, parse
    from quant.cli.flags import REPORT
    from quant.core.errors import InputError

    words = sys.argv[1:]
    compare = words[:1] == ["compare"]
    parser = bare_parser(REPORT, __doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories; first word compare: differences"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the page goes (default: the run; runs/report for several)"
    )
    add_flags(parser, REPORT)
    args = parse(parser, words[1:] if compare else words)
    from quant.cli.console import console as make_console
    from quant.report.page import write_report
    from quant.report.runs import open_run

    runs, console = [open_run(path) for path in args.runs], make_console()
    if compare:
        if len(runs) < 2:
            raise InputError("compare needs two run directories or more")
        show_differences(runs, console)
        return
    out = args.out or (runs[0].path if len(runs) == 1 else Path("runs") / "report")
    console.print(str(write_report(runs, out)), soft_wrap=True)


def show_differences(runs: Sequence[Any], console: Any, most: int = 12) -> None:
    """Three tables on the terminal."""
    from quant.cli.tables import difference_table
    from quant.report.compare import differences

    names = [run.path.name for run in runs]
    for part, rows in differences(runs).items():
        shown = rows[:most] if part == "linears" else rows
        title = f"{part}: {len(rows)} differ" + (
            f", the {len(shown)} with the largest ratio" if len(shown) < len(rows) else ""
        )
        console.print(difference_table(title, names, shown))
