"""python -m quant COMMAND: what works on runs and checkpoints that are there; and the commands that pip installs."""

import importlib
import sys

from quant.cli.commands import run
from quant.cli.errors import exit_code_of


def main() -> None:
    """Run ``llm-quantizer COMMAND``, which is ``python -m quant COMMAND``."""
    sys.exit(run(sys.argv[1:]))


def model_quantizer() -> None:
    """Run ``model-quantizer``, which is ``python model_quantizer.py``."""
    _run_file("model_quantizer", shared=True)


def learned() -> None:
    """Run ``quantize-learned``, which is ``python main.py``."""
    _run_file("main", shared=True)


def act_scale_shift() -> None:
    """Run ``generate-act-scale-shift``, which is ``python generate_act_scale_shift.py``."""
    _run_file("generate_act_scale_shift")


def _run_file(name: str, shared: bool = False) -> None:
    """Run the command line in a file beside ``quant/``. shared: one that several processes may do together."""
    sys.exit(exit_code_of(importlib.import_module(name).main, shared))


if __name__ == "__main__":
    main()
