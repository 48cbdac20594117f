"""python -m quant COMMAND: what works on runs and checkpoints that are there."""

import sys

from quant.cli.commands import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
