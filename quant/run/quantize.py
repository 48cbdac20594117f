"""How one block is quantized: statistics group by group, a solver on every linear, the result put in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.kept import KeptOutputs, Room
from quant.blocks.linears import LinearRef
from quant.blocks.saliency import TokenWeights
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.env import peak_bytes
from quant.core.errors import RunError
from quant.core.finite import all_finite
from quant.core.names import FULL_BITS
from quant.core.types import QuantizedWeight
from quant.learn.learner import LearnedBlock
from quant.run.bias import corrected_biases
from quant.run.experts import experts_at_once, is_experts, stages
from quant.run.linear import LinearRecord, besides
from quant.run.observe import observe
from quant.run.sharing import Solution, dealt
from quant.run.solving import Recipe, solve_linear, solve_together
from quant.run.statistics import InputStats, Original
from quant.solvers import declaration_for, solver_options


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
        if not all_finite(tensor):
            kept, used = (str(dtype).removeprefix("torch.") for dtype in (model.storage_of(name, index), model.dtype))
            raise RunError(
                f"block {index} {name}: not every value is finite in {kept}, as it is saved, and {used}, as it is run"
            )
    return deployed


@dataclass(frozen=True)
class SolvedBlock:
    """A block after its linears were solved: deployed weights, the answers by name, what else was changed, journal
    records, seconds of solving and of measuring what came of it."""

    weights: BlockWeights
    solved: Mapping[str, QuantizedWeight]
    changed: BlockWeights
    records: list[LinearRecord]
    seconds: Mapping[str, float]


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
    if len(steps) > 1 or original is not None:
        keep_outputs(stream, index, original)
    solved: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    measuring = 0.0
    for stage in steps:
        stats = observe(stream, index, weights, stage, recipe.act, original, tokens)
        answers, beside = solve_stage(stream, index, stage, stats, weights, recipe, learned)
        measuring += beside
        new = {name: answer for name, (answer, _) in answers.items()}
        solved, records = solved | new, records + [record for _, record in answers.values()]
        if recipe.act.method != "static":  # which quantizes inputs by ranges that are known at the end alone
            outputs_are_final(stream, new)
        originals = {name: learned.targets[name] if learned else weights.weight(name) for name in new}
        weights = deploy(weights, new, stream.model, index)
        if recipe.bias_correction:
            by_linear = {name: stats[group[0]].calibration for group in stage for name in group}
            biases = corrected_biases(stream.model, index, originals, weights, by_linear)
            weights, changed = deploy(weights, {}, stream.model, index, biases), changed | biases
    if recipe.act.method == "static":
        changed = replace(changed, input_ranges=static_ranges(stream, index, weights, recipe.act))
    weights = deploy(weights, {}, stream.model, index, changed)
    seconds = {"solve": sum(record.seconds for record in records), "measure": measuring}
    return SolvedBlock(weights, solved, changed, records, seconds)


def keep_outputs(stream: BlockStream, index: int, original: Original | None) -> None:
    """Let the streams in front of block ``index`` keep what linears write: the original's all, those of the quantized model once
    they are solved. Experts, which get other tokens each, are left out."""
    room = Room(stream.device)
    linears = [name for group in stream.model.groups_at(index) for name in group]
    ordinary = [name for name in linears if not is_experts(name, stream.model.family)]
    own, full = [stream, stream.heldout], [] if original is None else [original.stream, original.stream.heldout]
    for final, streams in (((), own), (ordinary, full)):
        for one in streams:
            if one is not None:
                one.kept = KeptOutputs(room, linears, final)


def outputs_are_final(stream: BlockStream, linears: Iterable[str]) -> None:
    """Linears are solved, and so is all in front of them."""
    own = [name for name in linears if not is_experts(name, stream.model.family)]
    for one in (stream, stream.heldout):
        if one is not None and one.kept is not None:
            one.kept.final.update(own)


def solve_stage(
    stream: BlockStream,
    index: int,
    stage: Sequence[Sequence[str]],
    stats: Mapping[str, InputStats],
    weights: BlockWeights,
    recipe: Recipe,
    learned: LearnedBlock | None,
) -> tuple[dict[str, Solution], float]:
    """Answers and journal records, by linear, of groups whose inputs are known; the seconds that this process took besides
    solving, to measure its own answers."""
    beside = 0.0

    def solve_one(name: str, inputs: InputStats, alone: bool = True) -> Solution:
        nonlocal beside
        weight, grid = weights.weight(name), None
        if learned is not None:
            weight, grid = learned.targets[name], learned.grids.get(name)
        own = recipe.of(index, name, weight.shape[1])
        started = time.perf_counter()
        answer, record = solve_linear(index, name, weight, inputs, own, grid, alone)
        beside += besides(started, [record])
        return with_peak(answer, record, stream.device)

    units = [(name, group[0]) for group in stage for name in group]
    if ranks.size() == 1:
        answers: dict[str, Solution] = {}
        for bundle in bundles(stream, units, weights, recipe, learned):
            if len(bundle) == 1:
                ((name, first),) = bundle
                answers[name] = solve_one(name, stats[first])
            else:
                own = {name: weights.weight(name) for name, _ in bundle}
                known, started = {name: stats[first] for name, first in bundle}, time.perf_counter()
                together = solve_together(index, own, known, recipe)
                beside += besides(started, (record for _, record in together.values()))
                answers |= {name: with_peak(*solution, stream.device) for name, solution in together.items()}
        return answers, beside
    assert recipe.spec is not None
    declared = declaration_for(recipe.solver)
    coupled = declared.rows_coupled or declared.outliers(solver_options(recipe.solver) | dict(recipe.options))
    coupled = coupled or recipe.spec.shared_rows > 1
    whole = [unit for unit in units if coupled or is_experts(unit[0], stream.model.family)]
    answers = {name: solve_one(name, stats[first], False) for name, first in units if (name, first) not in whole}
    answers |= dealt(whole, stats, solve_one, recipe.spec, stream.device)
    return {name: answers[name] for name, _ in units}, beside


def with_peak(answer: QuantizedWeight, record: LinearRecord, device: torch.device) -> Solution:
    """A solution whose record says the peak of memory so far."""
    peak = peak_bytes(device)
    return answer, replace(record, peak_bytes=peak["device"] or peak["host"])


def bundles(
    stream: BlockStream,
    units: Sequence[tuple[str, str]],
    weights: BlockWeights,
    recipe: Recipe,
    learned: LearnedBlock | None,
) -> Iterator[list[tuple[str, str]]]:
    """Linears in their order (with what their statistics are under): alone, or where the solver takes it and the device gains by
    it, experts' of one shape side by side."""
    spec, options = recipe.spec, solver_options(recipe.solver) | dict(recipe.options)
    can = (
        spec is not None
        and spec.super_kind is None
        and spec.shared_rows == 1
        and learned is None
        and not recipe.saliency
    )
    can = can and declaration_for(recipe.solver).stacks(options)
    waiting: list[tuple[str, str]] = []
    for unit in units:
        shape = weights.weight(unit[0]).shape
        alike = can and is_experts(unit[0], stream.model.family)
        full = len(waiting) == experts_at_once(shape[1], stream.device) if alike else True
        if waiting and (full or weights.weight(waiting[0][0]).shape != shape):
            yield waiting
            waiting = []
        if alike:
            waiting.append(unit)
        else:
            yield [unit]
    if waiting:
        yield waiting


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
        solve_linear(index, name, weight, stats[group[0]], recipe.of(index, name, weight.shape[1]))[1]
        for group in groups
        for name in group
        for weight in [weights.weight(name)]
        for recipe in recipes
    ]
