"""The command `python -m quant generate` under its older name."""

import sys

from quant.cli.commands import run

if __name__ == "__main__":
    sys.exit(run(["generate", *sys.argv[1:]]))
