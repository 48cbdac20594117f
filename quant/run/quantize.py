"""How one block is quantized: statistics group by group, a solver on every linear, the result put in place."""

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

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.linears import LinearRef
from quant.blocks.saliency import TokenWeights
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.env import peak_bytes
from quant.core.errors import InputError, RunError
from quant.core.gram import GramStats
from quant.core.grid import in_float16
from quant.core.linalg import SingularGramError, objective, output_errors, products_in, relative_errors
from quant.core.names import FULL_BITS, SUPER_COLUMNS
from quant.core.parts import row_parts, rows_of, stacked, stacked_grids
from quant.core.target import Correction, corrected
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.columns import describe as describe_kernels
from quant.learn.config import Learning
from quant.learn.learner import LearnedBlock
from quant.run.bias import corrected_biases
from quant.run.experts import is_experts, stages
from quant.run.linear import LinearRecord, input_rms, verdict, weight_peak
from quant.run.observe import observe
from quant.run.sharing import Solution, dealt, energy_in_rows, solved_in_rows
from quant.run.statistics import InputStats, Original
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

    def of(self, block: int, linear: str) -> Recipe:
        """The recipe of one linear."""
        return self if self.widths is None else self.with_bits(self.widths[block, linear])

    @property
    def asks_for_original(self) -> bool:
        """Whether it is solved with the original model's inputs beside those of the quantized one."""
        return self.spec is not None and (self.correction is not None or declaration_for(self.solver).uses_cross)


def deploy(
    weights: BlockWeights,
    solved: Mapping[str, QuantizedWeight],
    model: LazyModel,
    index: int,
    changed: BlockWeights | None = None,
) -> BlockWeights:
    """Weights of block ``index`` with the solved linears, and what else was changed, in place: as a checkpoint holds
    them (each rounded to its own dtype there), in the arithmetic's dtype.

    Raises RunError, with the tensor's name, where the dtype of the checkpoint or of the run cannot hold a number.
    """
    deployed = weights if changed is None else weights | changed.to(weights.device, model.dtype)
    parameters = deployed.parameters
    for linear, quantized in ((LinearRef.of_module(name), answer) for name, answer in solved.items()):
        stored = quantized.to(weights.device).dequantize().to(model.storage_of(linear.parameter, index))
        parameters = linear.replace(parameters, stored.to(model.dtype))
    deployed = replace(deployed, parameters=parameters)
    for name, tensor in deployed.since(weights).named().items():
        if not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):  # no mask of the whole tensor
            kept, used = (str(dtype).removeprefix("torch.") for dtype in (model.storage_of(name, index), model.dtype))
            raise RunError(
                f"block {index} {name}: not every value is finite in {kept}, as it is saved, and {used}, as it is run"
            )
    return deployed


@dataclass(frozen=True)
class SolvedBlock:
    """A block after its linears were solved: deployed weights, the answers by name, what else was changed, journal
    records, solver seconds."""

    weights: BlockWeights
    solved: Mapping[str, QuantizedWeight]
    changed: BlockWeights
    records: list[LinearRecord]
    seconds: float


def quantize_block(
    stream: BlockStream,
    index: int,
    weights: BlockWeights,
    recipe: Recipe,
    learned: LearnedBlock | None = None,
    full: BlockStream | None = None,
    tokens: TokenWeights | None = None,
) -> SolvedBlock:
    """Solve every linear of block ``index`` from the inputs that the stream holds; the stream stays in front of it.

    learned: the block with its transforms, which then is what is solved. full: the original model's stream in front of the
    same block, where the recipe asks for it. tokens: what tokens weigh, likewise. Raises InputError for non-finite inputs and RunError, with the linear's name, where a solver fails.
    """
    groups = stream.model.groups_at(index)
    steps = stages(groups) if recipe.true_sequential else [list(groups)]
    weights, changed = (learned.weights, learned.tensors) if learned else (weights, BlockWeights())
    if recipe.spec is None:
        steps = []
    original = None if full is None else Original(full, weights, residual_places(stream.model, recipe))
    solved: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    for stage in steps:
        stats = observe(stream, index, weights, stage, recipe.act, original, tokens)
        answers = solve_stage(stream, index, stage, stats, weights, recipe, learned)
        new = {name: answer for name, (answer, _) in answers.items()}
        solved, records = solved | new, records + [record for _, record in answers.values()]
        originals = {name: learned.targets[name] if learned else weights.weight(name) for name in new}
        weights = deploy(weights, new, stream.model, index)
        if recipe.bias_correction:
            by_linear = {name: stats[group[0]].calibration for group in stage for name in group}
            biases = corrected_biases(stream.model, index, originals, weights, by_linear)
            weights, changed = deploy(weights, {}, stream.model, index, biases), changed | biases
    if recipe.act.method == "static":
        changed = replace(changed, input_ranges=static_ranges(stream, index, weights, recipe.act))
    weights = deploy(weights, {}, stream.model, index, changed)
    return SolvedBlock(weights, solved, changed, records, sum(record.seconds for record in records))


def solve_stage(
    stream: BlockStream,
    index: int,
    stage: Sequence[Sequence[str]],
    stats: Mapping[str, InputStats],
    weights: BlockWeights,
    recipe: Recipe,
    learned: LearnedBlock | None,
) -> dict[str, Solution]:
    """Answers and journal records, by linear, of groups whose inputs are known."""

    def solve_one(name: str, inputs: InputStats, alone: bool = True) -> Solution:
        weight, grid = weights.weight(name), None
        if learned is not None:
            weight, grid = learned.targets[name], learned.grids.get(name)
        answer, record = solve_linear(index, name, weight, inputs, recipe.of(index, name), grid, alone)
        peak = peak_bytes(stream.device)
        return answer, replace(record, peak_bytes=peak["device"] or peak["host"])

    units = [(name, group[0]) for group in stage for name in group]
    if ranks.size() == 1:
        return {name: solve_one(name, stats[first]) for name, first in units}
    assert recipe.spec is not None
    declared = declaration_for(recipe.solver)
    coupled = declared.rows_coupled or declared.outliers(solver_options(recipe.solver) | dict(recipe.options))
    whole = [unit for unit in units if coupled or is_experts(unit[0], stream.model.family)]
    answers = {name: solve_one(name, stats[first], False) for name, first in units if (name, first) not in whole}
    answers |= dealt(whole, stats, solve_one, recipe.spec, stream.device)
    return {name: answers[name] for name, _ in units}


def residual_places(model: LazyModel, recipe: Recipe) -> Mapping[str, str]:
    """For linears that add to the residual stream the module whose input it is, where the recipe asks for that."""
    asked = recipe.correction is not None and recipe.correction.residual
    return model.family.residual_at(model.config) if asked else {}


def static_ranges(stream: BlockStream, index: int, weights: BlockWeights, act: ActSpec) -> dict[str, Tensor]:
    """Lowest and highest input of every linear of a deployed block over the calibration data, float32 [2] each, by linear."""
    spans: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[Tensor], None]:
        def update(x: Tensor) -> None:
            span = torch.stack([x.min(), x.max()]).float()
            old = spans.get(name, span)
            spans[name] = torch.stack([torch.minimum(old[0], span[0]), torch.maximum(old[1], span[1])])

        return update

    def of_all(span: Tensor) -> Tensor:
        low, high = zip(*ranks.all_told(span.tolist()), strict=True)
        return span.new_tensor([min(low), max(high)])

    names = [name for group in stream.model.groups_at(index) for name in group]
    stream.run(index, weights, observe={name: see(name) for name in names}, act=replace(act, bits=FULL_BITS))
    return {name: of_all(span) for name, span in spans.items()}


def compare_block(
    stream: BlockStream, index: int, weights: BlockWeights, recipes: Sequence[Recipe]
) -> list[LinearRecord]:
    """Records of every recipe for every linear of block ``index``, from one set of statistics; nothing is deployed."""
    groups = stream.model.groups_at(index)
    same = Original(stream, weights) if any(recipe.asks_for_original for recipe in recipes) else None
    stats = observe(stream, index, weights, groups, original=same)
    return [
        solve_linear(index, name, weights.weight(name), stats[group[0]], recipe)[1]
        for group in groups
        for name in group
        for recipe in recipes
    ]


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
    weight: Tensor, stats: GramStats, recipe: Recipe, grid: Grid | None = None
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
    `relative_errors`."""
    stored = in_float16(answer, weight)
    if stored is answer:
        return answer
    values = (one.dequantize() for one in (answer, stored))
    before, after = relative_errors(weight, values, energy)
    count = int((stored.grid.scale != answer.grid.scale).sum())
    return replace(stored, info={**answer.info, "rounded_scales": count, "rounded_scales_cost": after - before}).check()


def _tell_of_damping(where: str, answer: QuantizedWeight, recipe: Recipe) -> None:
    damping = answer.info.get("percdamp")
    if damping is not None and damping != recipe.options.get("percdamp", damping):
        log.warning("%s: the Gram matrix was singular, damping raised to %g", where, damping)


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
    spec, where = recipe.spec, f"block {block} {name}"
    assert spec is not None
    weight, calibration = weight.float(), stats.calibration.check(where)
    with name_errors(where):
        target, known = target_of(weight, calibration, recipe)
        if parts := stats.weighted.get(name):
            quantized, nearest, seconds = solve_in_parts(weight, [own.check(where) for own in parts], recipe, grid)
        else:
            wanted = target if recipe.correction else weight
            quantized, nearest, seconds = _solve_rows(wanted, known, recipe, grid, alone)
    in_rows = (lambda energy: energy) if alone else energy_in_rows
    energy = in_rows(partial(objective, gram=calibration.gram))
    quantized = store_in_float16(quantized, target, energy)
    _tell_of_damping(where, quantized, recipe)

    def answers() -> Iterator[Tensor]:  # one matrix at a time
        return (answer.dequantize() for answer in (quantized, rtn(weight, calibration, spec, grid=nearest)))

    solved = relative_errors(target, answers(), energy)
    sample = stats.heldout
    heldout = None if sample is None else output_errors(weight, answers(), sample.inputs, sample.full, in_rows)
    judged = heldout or solved
    takes_nothing = recipe.solver is rtn and recipe.correction is None
    rank = weight.shape[1] if takes_nothing else calibration.rank
    bits, is_short = quantized.bits_per_weight(), rank < weight.shape[1] or stats.routed == 0
    kept = 0 if quantized.outliers is None else quantized.outliers.value.numel()
    return quantized, LinearRecord(
        block=block,
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        method=recipe.method,
        bits=spec.bits,
        relative_error=solved[0],
        relative_error_rtn=solved[1],
        relative_error_heldout=None if heldout is None else heldout[0],
        relative_error_rtn_heldout=None if heldout is None else heldout[1],
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
