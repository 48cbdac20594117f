"""The command `python -m quant convert` under its older name."""

import sys

from quant.cli.commands import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
