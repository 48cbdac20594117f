"""What inputs weigh (``--imatrix``): the diagonals of the original model's Gram matrices, for llama.cpp's quantizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.gguf_importance import check_importance_file, write_importance
from models.gguf_layout import architecture_for
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.errors import InputError
from quant.run.config import RunConfig
from quant.run.inputs import Inputs
from quant.run.job import Progress

STAGE = "imatrix"


def check_importance(inputs: Inputs, file: Path) -> None:
    """Raise InputError where llama.cpp has no place for some linear of the model, or something else is at ``file``."""
    check_importance_file(file)
    config, family = inputs.model.config, inputs.model.family
    if family.experts:
        raise InputError(f"--imatrix: not for mixtures of experts ({config.model_type}); drop --imatrix")
    for index in range(len(inputs.model.blocks)):
        for name in (name for group in inputs.model.groups_at(index) for name in group):
            _place(inputs, index, name)


def keep_importance(inputs: Inputs, run: RunConfig, file: Path, progress: Progress) -> None:
    """Write the importance matrix of the original model on a run's calibration windows, one pass through all blocks."""
    model, stream = inputs.model, inputs.calibration_stream(run)
    sums: dict[str, Tensor] = {}
    for index in range(len(model.blocks)):
        own: dict[str, Tensor] = {}
        weights = BlockWeights.read(model, index, inputs.device)
        groups = model.groups_at(index)
        stream.run(index, weights, observe={group[0]: _adding(own, group[0]) for group in groups}, advance=True)
        of_all = {name: ranks.all_sum_(square).cpu() for name, square in own.items()}
        sums |= {_place(inputs, index, name): of_all[group[0]] for group in groups for name in group}
        progress(STAGE, index + 1, len(model.blocks), "")
    calibration = inputs.calibration(run)
    windows, length = calibration.ids.shape
    if ranks.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_importance(file, sums, windows * length, (calibration.name,), windows, length)


def _adding(sums: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """What adds the squares of inputs [..., in] to the sums under a name, in float64."""

    def add(x: Tensor) -> None:
        square = x.flatten(0, -2).double().square().sum(0)
        sums[name] = square if name not in sums else sums[name].add_(square)

    return add


def _place(inputs: Inputs, index: int, name: str) -> str:
    """The name of a linear's weight in llama.cpp's files. Raises InputError where it has none."""
    _, architecture = architecture_for(inputs.model.config)
    found = architecture.stored(f"{inputs.model.family.blocks}.{index}.{name}.weight")
    if found is None:
        raise InputError(
            f"--imatrix: {name} has no place in llama.cpp's files of {inputs.model.config.model_type} models"
        )
    return found[0]
