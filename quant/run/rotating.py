"""Learned rotations in a run (``--rotate-steps``): trained before anything is solved, kept in the cache by all that decides them,
and beside the blocks of every run that was solved with them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.core.errors import InputError
from quant.core.files import check_plain_file, json_sha256, write_atomically
from quant.core.types import QuantSpec
from quant.learn.config import Rotation
from quant.learn.rotation import RESIDUAL, Matrices, Rewriting, random_matrices, untied
from quant.learn.spin import Spin, links_of
from quant.run.observe import original_behind
from quant.tune.chain import Chain
from quant.tune.codes import Parameters
from quant.tune.config import Tuning, batch_of
from quant.tune.limits import recomputes
from quant.tune.objectives import model_objective
from quant.tune.optimize import begin, copied, optimize

FORM = 1  # of the files and of the training behind them: another number, and they are made again


@dataclass(frozen=True)
class LearnedRotation:
    """Matrices float64 by name, and how they were learned."""

    matrices: Matrices
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SpinTask:
    """What rotations are learned for. tokens: windows [n, T] of calibration; spec: None where weights stay; key: of all that
    decides the tokens and the model."""

    rotation: Rotation
    spec: QuantSpec | None
    act: ActSpec
    tokens: Tensor
    seed: int
    key: tuple[str, ...]

    def digest(self, model: LazyModel, device: torch.device) -> str:
        """A hash of all that decides the matrices on one machine."""
        spec = None if self.spec is None else self.spec.to_json()
        numbers = [FORM, self.rotation.to_json(), spec, vars(self.act), list(self.tokens.shape), self.seed, *self.key]
        return json_sha256({"spin": numbers, "dtype": str(model.dtype), "device": device.type})


class TurnedChain(Chain):
    """A chain whose hidden states are rotated in front of the first block, and back behind the last: embedding, last norm
    and head are the original's."""

    spin: Spin

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy: what moves is the model's, and no block's own."""
        return copied(dict(parameters))

    def __call__(self, parameters: Mapping[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
        """Hidden states of the original model's coordinates, of raw parameters."""
        matrices = self.spin.matrices(parameters)
        turn = matrices.get(RESIDUAL)
        if turn is None:
            return super().__call__(matrices, hidden, batch)
        turn = turn.to(hidden.dtype)
        return super().__call__(matrices, hidden @ turn, batch) @ turn.mT


def learned_rotation(
    model: LazyModel, task: SpinTask, device: torch.device, batch: int, cache: Path
) -> LearnedRotation:
    """The rotations that a task asks for, from the cache where they were learned before. batch: windows that pass a block at
    a time. Raises InputError where a file there is damaged."""
    path = cache / "rotations" / f"{task.digest(model, device)}.safetensors"
    known = read_matrices(path)
    if known is None:
        known = _train(model, task, device, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_matrices(path, known)
    return known


def _train(model: LazyModel, task: SpinTask, device: torch.device, batch: int) -> LearnedRotation:
    """All steps, and the best iterate on held-out windows."""
    started, outside = time.perf_counter(), model.outside_weights(device)
    stream = BlockStream(model, task.tokens, device=device, batch=batch).capture(outside)
    start = stream.in_batches_of(batch_of(len(task.tokens)), outside)
    rewriting = Rewriting.of(model, untied(model.config), task.rotation, device)
    spin = Spin(random_matrices(model, task.rotation))
    links = links_of(model, rewriting, task.spec, device)
    recompute = recomputes(model, len(task.tokens), task.tokens.shape[1], device, "--rotate-steps")
    chain = TurnedChain(start, {link.index: link for link in links}, task.act, recompute)
    chain.spin = spin
    objective = model_objective(chain, original_behind(start), outside)
    steps = Tuning("model", task.rotation.steps)
    state = begin(objective, spin.initial(device), steps, "--rotate-steps")
    optimize(objective, state, spin.rates(), steps, task.seed)
    record = state.record() | {"seconds": time.perf_counter() - started}
    return LearnedRotation({name: m.cpu() for name, m in spin.learned(state.best).items()}, record)


def write_matrices(path: Path, rotation: LearnedRotation) -> None:
    """Keep learned rotations."""
    tensors = {name: matrix.contiguous() for name, matrix in rotation.matrices.items()}
    write_atomically(path, save(tensors, {"format": "pt", "rotation": json.dumps(rotation.record)}))


def read_matrices(path: Path) -> LearnedRotation | None:
    """Learned rotations that were kept; None where none are. Raises InputError where they are damaged."""
    check_plain_file(path)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["rotation"])
            return LearnedRotation({name: file.get_tensor(name) for name in file.keys()}, record)  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and the rotations are learned again") from error


def keep_rotation(path: Path, rotation: LearnedRotation | None) -> None:
    """Keep the matrices that a run is solved with beside its blocks. Raises InputError where others are there already."""
    if rotation is None:
        return
    kept = read_matrices(path)
    if kept is None:
        write_matrices(path, rotation)
    elif any(not torch.equal(matrix, kept.matrices[name]) for name, matrix in rotation.matrices.items()):
        raise InputError(
            f"{path} holds other rotations than this machine learns: go on where the run was begun, or --overwrite it"
        )


def kept_matrices(path: Path, rotation: Rotation) -> Matrices | None:
    """The matrices of a run's rotation where they were learned. Raises InputError where they are not there any more."""
    if not rotation.steps:
        return None
    kept = read_matrices(path)
    if kept is None:
        raise InputError(f"{path} is missing: without it nobody knows the model of the run; run its command again")
    return kept.matrices
