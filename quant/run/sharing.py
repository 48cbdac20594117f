"""What several processes of one job share out: calibration windows, rows of a linear, whole linears.

A linear whose rows do not depend on each other is solved by all processes, each on its rows. Where rows do (blocks of scales,
outliers by a threshold over the matrix), and for experts, whole linears go round. Every process then holds every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from data.written import written
from quant.core import ranks
from quant.core.errors import InputError
from quant.core.parts import row_parts, stacked, stacked_grids
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.learn.config import Learning
from quant.run.answers import answer_in, tensors_of
from quant.run.config import RunConfig
from quant.run.linear import LinearRecord
from quant.run.statistics import InputStats

Solution = tuple[QuantizedWeight, LinearRecord]
Part = tuple[QuantizedWeight, Grid, float]  # an answer, the grid of rounding to nearest, seconds


def check_sharing(run: RunConfig, processes: int) -> None:
    """Raise InputError for what several processes cannot share, or have nothing to share of."""
    if processes == 1 or not run.quantizes:
        return
    asked = {
        "--tune": run.tuning is not None,
        "--saliency": run.saliency > 0,
        "--avg-bits": run.avg_bits is not None,
        "--rotate-steps": run.rotation is not None and run.rotation.steps > 0,
        f"--dataset {run.dataset}": written(run.dataset) is not None,
        "--whole_model": run.learning is not None and run.learning.together > 0,
    }
    lines = [
        f"{flag}: of one process, and {processes} were started: drop it, or start the run without torchrun"
        for flag, given in asked.items()
        if given
    ]
    if run.windows < processes:
        lines.append(
            f"--nsamples {run.windows}: {processes} processes need a window each; give --nsamples {processes} or more"
        )
    if not lines and run.learning is not None:
        lines += _learning_mistakes(run.learning, run.windows, processes)
    if lines:
        raise InputError(*lines)


def _learning_mistakes(learning: Learning, windows: int, processes: int) -> Iterator[str]:
    """Why a step of learning cannot be taken by all processes together."""
    if learning.batch % processes or windows % learning.batch:
        yield (
            f"--batch_size {learning.batch} with {windows} windows: {processes} processes share every step; give a multiple of "
            f"{processes} that divides --nsamples"
        )
    if learning.distribution:
        yield (
            "the distribution loss of abq is of a whole batch and not of its parts: give --without distribution, or start the "
            "run without torchrun"
        )


def own_rows(n_out: int) -> slice:
    """This process's part of the rows of a linear; none where there are fewer rows than processes."""
    parts = row_parts(n_out, ranks.size())
    return parts[ranks.rank()] if ranks.rank() < len(parts) else slice(0, 0)


def solved_in_rows(n_out: int, solve: Callable[[slice], Part], spec: QuantSpec, device: torch.device) -> Part:
    """The answer of all processes, of which each solves its rows. spec: of the answer."""
    rows, mine = own_rows(n_out), {}
    seconds = 0.0
    if rows.stop > rows.start:
        answer, nearest, seconds = solve(rows)
        only_grid = replace(answer, grid=deepcopy(nearest), codes=answer.codes[:0].clone(), info={}, outliers=None)
        mine = {"answer": answer, "nearest": only_grid}  # copies: a file of tensors holds none twice
    parts = [given for given in all_answers(mine, device) if given]
    answers = [replace(given["answer"], spec=spec) for given in parts]
    return stacked(answers), stacked_grids([given["nearest"].grid for given in parts]), seconds


def dealt(
    units: Sequence[tuple[str, str]],
    stats: Mapping[str, InputStats],
    solve: Callable[[str, InputStats], Solution],
    spec: QuantSpec,
    device: torch.device,
) -> dict[str, Solution]:
    """Answers and journal records by linear, of which each process solves every n-th as a whole. units: linears, and the first
    of their groups, under which ``stats`` has their inputs: all processes add these up. spec: of the answers."""
    mine: dict[str, Solution] = {}
    for start in range(0, len(units), ranks.size()):
        turn: tuple[str, InputStats] | None = None
        for owner, (name, first) in enumerate(units[start : start + ranks.size()]):
            inputs = stats[first]
            if owner == ranks.rank():
                turn = (name, inputs)
        if turn is not None:
            mine[turn[0]] = solve(*turn)
    answers = all_answers({name: answer for name, (answer, _) in mine.items()}, device)
    records = ranks.all_told({name: record.to_json() for name, (_, record) in mine.items()})
    return {
        name: (replace(answer, spec=spec.for_inputs(answer.codes.shape[1])), LinearRecord.from_json(own[name]))
        for given, own in zip(answers, records, strict=True)
        for name, answer in given.items()
    }


def all_answers(mine: Mapping[str, QuantizedWeight], device: torch.device) -> list[dict[str, QuantizedWeight]]:
    """The answers of every process by rank, each by name, on the device."""
    tensors, linears = tensors_of(mine)
    told = ranks.all_told(linears)
    given = ranks.all_bytes(save(tensors) if tensors else b"", "codes", device)
    answers = []
    for entries, payload in zip(told, given, strict=True):
        own = load(payload) if payload else {}
        answers.append({name: answer_in(own.__getitem__, name, entry).to(device) for name, entry in entries.items()})
    return answers


def energy_in_rows(energy: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    """‖E X‖² of a matrix E [out, in] that all processes hold: each multiplies its rows, the parts are added by rank."""
    if ranks.size() == 1:
        return energy

    def shared(error: Tensor) -> float:
        rows = own_rows(error.shape[0])
        return sum(ranks.all_told(energy(error[rows]) if rows.stop > rows.start else 0.0))

    return shared
