"""The old name of what `parser`, `errors`, `console` and `tables` hold, for those who import it from here."""

from quant.cli.console import Console, ProgressBars, console
from quant.cli.errors import exit_code_of as guarded
from quant.cli.errors import explain as said_of
from quant.cli.errors import set_logging
from quant.cli.parser import Parser
from quant.cli.tables import STAGES, comparison_table, difference_table, linears_table, loadability_table, show_results

__all__ = [
    "STAGES",
    "Console",
    "Parser",
    "ProgressBars",
    "comparison_table",
    "console",
    "difference_table",
    "guarded",
    "linears_table",
    "loadability_table",
    "said_of",
    "set_logging",
    "show_results",
]
