"""One linear, or experts of one shape together: what is solved for, the answer, and its line of the journal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.blocks.fake_quant import ActSpec
from quant.core import ranks
from quant.core.errors import InputError, RunError
from quant.core.gram import GramStats
from quant.core.grid import in_float16
from quant.core.linalg import SingularGramError, objective, products_in, relative_to
from quant.core.names import SUPER_COLUMNS
from quant.core.parts import row_parts, rows_of, stacked, stacked_grids
from quant.core.stacks import StackedStats
from quant.core.target import Correction, corrected
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.columns import describe as describe_kernels
from quant.learn.config import Learning
from quant.run.linear import LinearRecord, input_rms, verdict, weight_peak
from quant.run.sharing import Solution, energy_in_rows, solved_in_rows
from quant.run.statistics import InputStats
from quant.solvers import declaration_for, solver_options
from quant.solvers.rtn import rtn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What is done to every block: learning, if any, then a solver with its options on a grid.

    spec: None leaves the weights in full precision. learning: of transforms and clips; the solver then gets the
    transformed weights and the learned grid. act: bits of the activations.
    true_sequential: every group of linears sees the outputs of those solved before it in the same block.
    precision: of float32 matrix products inside the solver (torch.set_float32_matmul_precision): ``highest``, or
    ``high`` (TF32, or bfloat16 in three parts) and ``medium``, which errors and objectives are never measured in.
    correction: of what is solved for, towards the outputs of the original model; None: the weights themselves.
    saliency: parts of the rows of every linear that are solved each with its own weights of tokens; 0: none.
    bias_correction: see `corrected_biases`.
    widths: bits by block and linear, where they are mixed.
    """

    method: str
    solver: Callable[..., QuantizedWeight]
    spec: QuantSpec | None
    options: Mapping[str, Any] = field(default_factory=dict)
    true_sequential: bool = False
    precision: str = "highest"
    learning: Learning | None = None
    act: ActSpec = field(default_factory=ActSpec)
    correction: Correction | None = None
    saliency: int = 0
    bias_correction: bool = False
    widths: Mapping[tuple[int, str], int] | None = None

    def with_bits(self, bits: int) -> Recipe:
        """The same on a grid of so many bits."""
        assert self.spec is not None
        return replace(self, spec=replace(self.spec, bits=bits))

    def of(self, block: int, linear: str, n_in: int) -> Recipe:
        """The recipe of one linear of so many inputs."""
        own = self if self.widths is None else self.with_bits(self.widths[block, linear])
        return own if own.spec is None else replace(own, spec=own.spec.for_inputs(n_in))

    @property
    def asks_for_original(self) -> bool:
        """Whether it is solved with the original model's inputs beside those of the quantized one."""
        return self.spec is not None and (self.correction is not None or declaration_for(self.solver).uses_cross)


def check_options(recipe: Recipe, device: torch.device) -> QuantizedWeight:
    """The answer for one small layer, so that no work is lost later. Raises InputError where the solver refuses its options."""
    assert recipe.spec is not None
    whole = SUPER_COLUMNS if recipe.spec.super_kind else recipe.spec.group_size
    n_in = max(1, 128 // whole) * whole if whole > 0 else 128
    weight = torch.linspace(-1, 1, 4 * n_in, device=device).view(4, n_in)
    stats = GramStats.from_gram(torch.eye(n_in, device=device))
    stats.cross = stats.gram.clone()
    with name_errors(f"{recipe.method} with these options"):
        if not recipe.saliency:
            return solve(weight, stats, recipe)[0]
        uneven = GramStats.from_gram(torch.diag(torch.arange(1.0, n_in + 1, device=device)))
        uneven.cross = uneven.gram.clone()  # other columns come first in another part of the rows
        return solve_in_parts(weight, [stats, uneven], recipe)[0]


@contextmanager
def name_errors(where: str) -> Iterator[None]:
    """A solver's errors as those of a run, which say of what they are."""
    try:
        yield
    except SingularGramError as error:
        raise RunError(f"{where}: {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def solve(
    weight: Tensor, stats: GramStats | StackedStats, recipe: Recipe, grid: Grid | None = None
) -> tuple[QuantizedWeight, Grid, float]:
    """One answer, the grid of rounding to nearest, and the seconds that the answer took. grid: a learned one, for both.

    The grid of rounding to nearest is fitted once: a solver that would begin with it gets it. Raises ValueError where
    the answer is not legal, or what the solver raises.
    """
    assert recipe.spec is not None
    options = solver_options(recipe.solver) | dict(recipe.options)
    gets_it = grid is not None or declaration_for(recipe.solver).starts_at_nearest(options, recipe.spec.group_size)
    started = time.perf_counter()
    nearest = rtn(weight, stats, recipe.spec).grid if grid is None else grid
    if not gets_it:
        started = time.perf_counter()
    given = {"grid": nearest} if gets_it else {}
    with products_in(recipe.precision):
        answer = recipe.solver(weight, stats, recipe.spec, **given, **recipe.options).check()
    return answer, nearest, time.perf_counter() - started


def _solve_rows(
    weight: Tensor, stats: GramStats, recipe: Recipe, grid: Grid | None, alone: bool
) -> tuple[QuantizedWeight, Grid, float]:
    """`solve`, by all processes of the job unless ``alone``."""
    assert recipe.spec is not None
    if alone or ranks.size() == 1:
        return solve(weight, stats, recipe, grid)

    def of_rows(rows: slice) -> tuple[QuantizedWeight, Grid, float]:
        return solve(weight[rows], stats, recipe, None if grid is None else rows_of(grid, rows))

    return solved_in_rows(weight.shape[0], of_rows, recipe.spec, weight.device)


def solve_in_parts(
    weight: Tensor, stats: Sequence[GramStats], recipe: Recipe, grid: Grid | None = None
) -> tuple[QuantizedWeight, Grid, float]:
    """`solve` for parts of the rows, each with statistics (and a target) of its own. Raises ValueError where the answers do
    not fit together."""
    if declaration_for(recipe.solver).rows_coupled:
        raise ValueError("its rows depend on each other: --saliency solves them in parts")
    answers = []
    for rows, own in zip(row_parts(weight.shape[0], len(stats)), stats, strict=True):
        target, known = target_of(weight[rows], own, recipe)
        of_rows = None if grid is None else rows_of(grid, rows)
        answers.append(solve(target if recipe.correction else weight[rows], known, recipe, of_rows))
    whole, nearest, seconds = zip(*answers, strict=True)
    return stacked(whole), stacked_grids(nearest), sum(seconds)


def target_of(weight: Tensor, calibration: GramStats, recipe: Recipe) -> tuple[Tensor, GramStats]:
    """What an answer is measured against, and the statistics to solve with: the weight and those of calibration, or what
    the original model's outputs ask for. Raises what `corrected` does."""
    if not recipe.asks_for_original:
        return weight, calibration
    target, damped = corrected(weight, calibration, recipe.correction or Correction())
    return target, damped if recipe.correction else calibration


def store_in_float16(answer: QuantizedWeight, weight: Tensor, energy: Callable[[Tensor], float]) -> QuantizedWeight:
    """The answer as checkpoints can hold it (see `in_float16`); what that costs the layer is in its ``info``. energy: as of
    `relative_to`."""
    stored = in_float16(answer, weight)
    if stored is answer:
        return answer
    error = relative_to(weight, energy)
    before, after = (error(one.dequantize()) for one in (answer, stored))
    count = int((stored.grid.scale != answer.grid.scale).sum())
    return replace(stored, info={**answer.info, "rounded_scales": count, "rounded_scales_cost": after - before}).check()


def _tell_of_damping(where: str, answer: QuantizedWeight, recipe: Recipe) -> None:
    damping = answer.info.get("percdamp")
    if damping is not None and damping != recipe.options.get("percdamp", damping):
        log.warning("%s: the Gram matrix was singular, damping raised to %g", where, damping)


@dataclass(frozen=True)
class Problem:
    """One linear before it is solved: its weight in float32, what is known of its inputs, and what is solved for with which
    statistics (`target_of`)."""

    block: int
    name: str
    weight: Tensor
    inputs: InputStats
    target: Tensor
    known: GramStats

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"block {self.block} {self.name}"

    def wanted(self, recipe: Recipe) -> Tensor:
        """What the solver is given."""
        return self.target if recipe.correction else self.weight


def pose(block: int, name: str, weight: Tensor, inputs: InputStats, recipe: Recipe) -> Problem:
    """The problem of one linear. Raises InputError for inputs that are not finite, and what `target_of` does."""
    weight, where = weight.float(), f"block {block} {name}"
    calibration = inputs.calibration.check(where)
    with name_errors(where):
        return Problem(block, name, weight, inputs, *target_of(weight, calibration, recipe))


def solve_linear(
    block: int,
    name: str,
    weight: Tensor,
    stats: InputStats,
    recipe: Recipe,
    grid: Grid | None = None,
    alone: bool = False,
) -> Solution:
    """One linear's answer, on the learned grid if there is one, and its line of the journal (without memory). Errors are
    those of its outputs from what it was solved for: its own, or with a correction the original model's. alone: by this
    process; else all processes of the job solve it, each some rows."""
    problem = pose(block, name, weight, stats, recipe)
    with name_errors(problem.where):
        if parts := stats.weighted.get(name):
            checked = [own.check(problem.where) for own in parts]
            answer, nearest, seconds = solve_in_parts(problem.weight, checked, recipe, grid)
        else:
            answer, nearest, seconds = _solve_rows(problem.wanted(recipe), problem.known, recipe, grid, alone)
    return told(problem, answer, nearest, seconds, recipe, alone)


def told(
    problem: Problem, quantized: QuantizedWeight, nearest: Grid, seconds: float, recipe: Recipe, alone: bool
) -> Solution:
    """An answer as checkpoints hold it, and its line of the journal. nearest: the grid of rounding to nearest."""
    spec, weight, stats, target = recipe.spec, problem.weight, problem.inputs, problem.target
    assert spec is not None
    calibration = stats.calibration
    in_rows = (lambda energy: energy) if alone else energy_in_rows
    energy = in_rows(partial(objective, gram=calibration.gram))
    quantized = store_in_float16(quantized, target, energy)
    _tell_of_damping(problem.where, quantized, recipe)

    sample = stats.heldout
    measures = [relative_to(target, energy), *([] if sample is None else [sample.errors_of(weight, in_rows)])]
    values = (answer.dequantize() for answer in (quantized, rtn(weight, calibration, spec, grid=nearest)))
    solved, *heldout = zip(*([error(one) for error in measures] for one in values), strict=True)
    judged = heldout[0] if heldout else solved
    takes_nothing = recipe.solver is rtn and recipe.correction is None
    rank = weight.shape[1] if takes_nothing else calibration.rank
    bits, is_short = quantized.bits_per_weight(), rank < weight.shape[1] or stats.routed == 0
    kept = 0 if quantized.outliers is None else quantized.outliers.value.numel()
    return quantized, LinearRecord(
        block=problem.block,
        name=problem.name,
        shape=(weight.shape[0], weight.shape[1]),
        method=recipe.method,
        bits=spec.bits,
        relative_error=solved[0],
        relative_error_rtn=solved[1],
        relative_error_heldout=judged[0] if heldout else None,
        relative_error_rtn_heldout=judged[1] if heldout else None,
        bits_per_weight=bits,
        storage_bits=quantized.storage_bits(),
        scale_bits=quantized.grid.scale_bits,
        n_tokens=calibration.n_tokens if stats.routed is None else stats.routed,
        verdict=verdict(judged[0], judged[1], bits, is_short),
        kernels=describe_kernels(weight.device),
        input_rms=input_rms(calibration),
        weight_peak=weight_peak(weight),
        outlier_share=kept / weight.numel(),
        seconds=round(seconds, 4),
        rank=rank if is_short else None,
        info=quantized.info,
    )


def solve_together(
    block: int, weights: Mapping[str, Tensor], stats: Mapping[str, InputStats], recipe: Recipe
) -> dict[str, Solution]:
    """Answers and journal records (without memory), by name, of linears of one shape that are solved as one stack; each has
    its share of the seconds."""
    problems = [pose(block, name, weights[name], inputs, recipe) for name, inputs in stats.items()]
    rows = len(problems[0].weight)
    wanted = torch.cat([problem.wanted(recipe) for problem in problems])
    with name_errors(f"block {block} {problems[0].name} and {len(problems) - 1} more"):
        answer, nearest, seconds = solve(wanted, StackedStats([problem.known for problem in problems], rows), recipe)
    found = {}
    for number, problem in enumerate(problems):
        own = slice(number * rows, (number + 1) * rows)
        grid = replace(rows_of(answer.grid, own), g_idx=answer.grid.g_idx.clone())  # nothing that files would share
        part = QuantizedWeight(answer.codes[own].clone(), grid, answer.spec, answer.info)
        found[problem.name] = told(problem, part, rows_of(nearest, own), seconds / len(problems), recipe, alone=True)
    return found
