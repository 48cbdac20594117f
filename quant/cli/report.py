"""python -m quant report: a page of finished runs, or what differs between them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse, open, write or compare."""
    from quant.cli.errors import set_logging
    from quant.cli.parser import Parser
    from quant.core.errors import InputError

    words = sys.argv[1:]
    compare = words[:1] == ["compare"]
    parser: Any = Parser(
        prog="python -m quant report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories; first word compare: differences"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the page goes (default: the run; runs/report for several)"
    )
    args = parser.parse_args(words[1:] if compare else words)
    set_logging("error")
    from quant.cli.console import console as make_console
    from quant.report.page import open_run, write_report

    runs, console = [open_run(path) for path in args.runs], make_console()
    if compare:
        if len(runs) < 2:
            raise InputError("compare needs two run directories or more")
        show_differences(runs, console)
        return
    out = args.out or (runs[0].path if len(runs) == 1 else Path("runs") / "report")
    console.print(str(write_report(runs, out)), highlight=False, soft_wrap=True)


def show_differences(runs: Sequence[Any], console: Any, most: int = 12) -> None:
    """Three tables on the terminal."""
    from quant.cli.tables import difference_table
    from quant.report.page import differences

    names = [run.path.name for run in runs]
    for part, rows in differences(runs).items():
        shown = rows[:most] if part == "linears" else rows
        title = f"{part}: {len(rows)} differ" + (
            f", the {len(shown)} with the largest ratio" if len(shown) < len(rows) else ""
        )
        console.print(difference_table(title, names, shown))
