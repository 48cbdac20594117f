"""The command `python -m quant repeat` under its older name."""

import sys

from quant.cli.commands import run

if __name__ == "__main__":
    sys.exit(run(["repeat", *sys.argv[1:]]))
