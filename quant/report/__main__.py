"""The command `python -m quant report` under its older name."""

import sys

from quant.cli.commands import run

if __name__ == "__main__":
    sys.exit(run(["report", *sys.argv[1:]]))
