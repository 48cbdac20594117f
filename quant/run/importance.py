"""What inputs weigh (``--imatrix``): the diagonals of the original model's Gram matrices, for llama.cpp's quantizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.gguf_architectures import architecture_for
from models.gguf_importance import check_importance_file, write_importance
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
    for index in range(len(inputs.model.blocks)):
        for name in (name for group in inputs.model.groups_at(index) for name in group):
            _place(inputs, index, name)


def keep_importance(inputs: Inputs, run: RunConfig, file: Path, progress: Progress) -> None:
    """Write the importance matrix of the original model on a run's calibration windows, one pass through all blocks."""
    model, stream = inputs.model, inputs.calibration_stream(run)
    sums: dict[str, list[Squares]] = {}
    for index in range(len(model.blocks)):
        weights = BlockWeights.read(model, index, inputs.device)
        groups = model.groups_at(index)
        own = {group[0]: Squares(weights.weight(group[0]).shape[1], inputs.device) for group in groups}
        stream.run(index, weights, observe={name: squares.add for name, squares in own.items()}, advance=True)
        for group in groups:
            own[group[0]].share()
            for name in group:
                sums.setdefault(_place(inputs, index, name), []).append(own[group[0]])
        progress(STAGE, index + 1, len(model.blocks), "")
    calibration = inputs.calibration(run)
    windows, length = calibration.ids.shape
    if ranks.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        stacked = {
            name: (torch.stack([one.total for one in parts]), torch.tensor([one.tokens for one in parts]))
            for name, parts in sums.items()
        }
        write_importance(file, stacked, (calibration.name,), windows, length)


class Squares:
    """Sums of the squares of inputs [in], in float64, and of how many tokens; of an expert, of those that it was given."""

    def __init__(self, n_in: int, device: torch.device) -> None:
        self.total, self.tokens = torch.zeros(n_in, dtype=torch.float64, device=device), 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., in]."""
        rows = x.flatten(0, -2).double()
        self.total += rows.square().sum(0)
        self.tokens += len(rows)

    def share(self) -> None:
        """With what the other processes of the job have seen, on the host."""
        self.total = ranks.all_sum_(self.total).cpu()
        self.tokens = sum(ranks.all_told(self.tokens))


def _place(inputs: Inputs, index: int, name: str) -> str:
    """The name of a linear's weight in llama.cpp's files, one for all experts of a block. Raises InputError where it has none."""
    _, architecture = architecture_for(inputs.model.config)
    full = f"{inputs.model.family.blocks}.{index}.{name}.weight"
    if stack := architecture.stacked(full):
        return stack
    found = architecture.stored(full)
    if found is None:
        raise InputError(
            f"--imatrix: {name} has no place in llama.cpp's files of {inputs.model.config.model_type} models"
        )
    return found[0]
