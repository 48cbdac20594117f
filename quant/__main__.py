"""python -m quant COMMAND: what works on runs and checkpoints that are there; and the commands that pip installs."""

import sys

from quant.cli.commands import run
from quant.cli.terminal import guarded


def main() -> None:
    """Run ``llm-quantizer COMMAND``, which is ``python -m quant COMMAND``."""
    sys.exit(run(sys.argv[1:]))


def model_quantizer() -> None:
    """Run ``model-quantizer``, which is ``python model_quantizer.py``."""
    import model_quantizer as command

    sys.exit(guarded(command.main))


def learned() -> None:
    """Run ``quantize-learned``, which is ``python main.py``."""
    import main as command

    sys.exit(guarded(command.main))


def act_scale_shift() -> None:
    """Run ``generate-act-scale-shift``, which is ``python generate_act_scale_shift.py``."""
    import generate_act_scale_shift as command

    sys.exit(guarded(command.main))


if __name__ == "__main__":
    main()
