"""The command `python -m quant evaluate` under its older name."""

import sys

from quant.cli.commands import run

if __name__ == "__main__":
    sys.exit(run(["evaluate", *sys.argv[1:]]))
