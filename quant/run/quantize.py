"""How one block is quantized: statistics group by group, a solver on every linear, the result put in place."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.fake_quant import FULL_BITS, ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import input_range_name
from quant.core.env import peak_bytes
from quant.core.errors import InputError, RunError
from quant.core.gram import GramStats
from quant.core.linalg import SingularGramError, products_in, relative_error
from quant.core.scaling import exponent_outside
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.kernels.columns import describe as describe_kernels
from quant.learn.config import Learning
from quant.learn.learner import LearnedBlock
from quant.run.directory import Record
from quant.solvers.rtn import rtn

log = logging.getLogger(__name__)
LOOK_ABOVE = 0.1  # relative error of a linear from which a person should look


@dataclass(frozen=True)
class Recipe:
    """What is done to every block: learning, if any, then a solver with its options on a grid.

    spec: None leaves the weights in full precision. learning: of transforms and clips; the solver then gets the
    transformed weights and the learned grid. act: bits of the activations.
    true_sequential: every group of linears sees the outputs of those solved before it in the same block.
    precision: of float32 matrix products inside the solver (torch.set_float32_matmul_precision): ``highest``, or
    ``high`` (TF32, or bfloat16 in three parts) and ``medium``, which errors and objectives are never measured in.
    """

    method: str
    solver: Callable[..., QuantizedWeight]
    spec: QuantSpec | None
    options: Mapping[str, Any] = field(default_factory=dict)
    true_sequential: bool = False
    precision: str = "highest"
    learning: Learning | None = None
    act: ActSpec = field(default_factory=ActSpec)


def deploy(
    weights: Weights,
    solved: Mapping[str, QuantizedWeight],
    model: LazyModel,
    index: int,
    changed: Mapping[str, Tensor] | None = None,
) -> Weights:
    """Weights of block ``index`` with the solved linears, and what else was changed, in place: as a checkpoint holds
    them (each rounded to its own dtype there), in the arithmetic's dtype.

    Raises RunError, with the tensor's name, where the dtype of the checkpoint or of the run cannot hold a number.
    """
    device = next(iter(weights.values())).device
    others = {name: tensor.to(device=device, dtype=model.dtype) for name, tensor in (changed or {}).items()}
    new = {}
    for linear, quantized in solved.items():
        name = f"{linear}.weight"
        new[name] = quantized.to(device).dequantize().to(model.storage_of(name, index)).to(model.dtype)
    for name, tensor in {**others, **new}.items():
        if not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):  # no mask of the whole tensor
            kept, used = (str(dtype).removeprefix("torch.") for dtype in (model.storage_of(name, index), model.dtype))
            raise RunError(
                f"block {index} {name}: not every value is finite in {kept}, as it is saved, and {used}, as it is run"
            )
    return {**weights, **others, **new}


@dataclass(frozen=True)
class SolvedBlock:
    """A block after its linears were solved: deployed weights, the answers by name, what else was changed, journal
    records, solver seconds."""

    weights: Weights
    solved: Mapping[str, QuantizedWeight]
    changed: Weights
    records: list[Record]
    seconds: float


def quantize_block(
    stream: BlockStream, index: int, weights: Weights, recipe: Recipe, learned: LearnedBlock | None = None
) -> SolvedBlock:
    """Solve every linear of block ``index`` from the inputs that the stream holds; the stream stays in front of it.

    learned: the block with its transforms, which then is what is solved. Raises InputError for non-finite inputs and RunError, with the linear's name, where a solver fails.
    """
    groups = stream.model.groups
    stages = [[group] for group in groups] if recipe.true_sequential else [list(groups)]
    weights, changed = (learned.weights, dict(learned.tensors)) if learned else (weights, {})
    if recipe.spec is None:
        stages = []
    solved: dict[str, QuantizedWeight] = {}
    records: list[Record] = []
    solving = 0.0
    for stage in stages:
        stats = {g[0]: GramStats(weights[f"{g[0]}.weight"].shape[1], stream.device) for g in stage}
        stream.run(index, weights, observe={name: s.update for name, s in stats.items()}, act=recipe.act)
        for group in stage:
            for name in group:
                started = time.perf_counter()
                weight, grid = weights[f"{name}.weight"], None
                if learned is not None:
                    weight, grid = learned.targets[name], learned.grids[name]
                solved[name], record = solve_linear(f"block {index} {name}", weight, stats[group[0]], recipe, grid)
                record |= {"seconds": round(time.perf_counter() - started, 4)}
                peak = peak_bytes(stream.device)
                records.append({"block": index, "name": name} | record | {"peak_bytes": peak["device"] or peak["host"]})
                solving += time.perf_counter() - started
        new = {name: solved[name] for group in stage for name in group}
        weights = deploy(weights, new, stream.model, index)
    if recipe.act.method == "static":
        changed |= static_ranges(stream, index, weights, recipe.act)
    weights = deploy(weights, {}, stream.model, index, changed)
    return SolvedBlock(weights, solved, changed, records, solving)


def static_ranges(stream: BlockStream, index: int, weights: Weights, act: ActSpec) -> Weights:
    """Lowest and highest input of every linear of a deployed block over the calibration data, float32 [2] each."""
    spans: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[Tensor], None]:
        def update(x: Tensor) -> None:
            span = torch.stack([x.min(), x.max()]).float()
            old = spans.get(name, span)
            spans[name] = torch.stack([torch.minimum(old[0], span[0]), torch.maximum(old[1], span[1])])

        return update

    names = [name for group in stream.model.groups for name in group]
    stream.run(index, weights, observe={name: see(name) for name in names}, act=replace(act, bits=FULL_BITS))
    return {input_range_name(name): span for name, span in spans.items()}


def compare_block(stream: BlockStream, index: int, weights: Weights, recipes: Sequence[Recipe]) -> list[Record]:
    """Records of every recipe for every linear of block ``index``, from one set of statistics; nothing is deployed."""
    groups = stream.model.groups
    stats = {g[0]: GramStats(weights[f"{g[0]}.weight"].shape[1], stream.device) for g in groups}
    stream.run(index, weights, observe={name: s.update for name, s in stats.items()})
    records = []
    for group in groups:
        for name, recipe in ((name, recipe) for name in group for recipe in recipes):
            started = time.perf_counter()
            _, record = solve_linear(f"block {index} {name}", weights[f"{name}.weight"], stats[group[0]], recipe)
            seconds = round(time.perf_counter() - started, 4)
            records.append({"block": index, "name": name} | record | {"seconds": seconds})
    return records


def check_options(recipe: Recipe, device: torch.device) -> None:
    """Raise InputError where the solver refuses its options: it solves one small layer, so that no work is lost later."""
    assert recipe.spec is not None
    n_in = max(1, 128 // recipe.spec.group_size) * recipe.spec.group_size if recipe.spec.group_size > 0 else 128
    weight = torch.linspace(-1, 1, 4 * n_in, device=device).view(4, n_in)
    solve_linear(
        f"{recipe.method} with these options", weight, GramStats.from_gram(torch.eye(n_in, device=device)), recipe
    )


def solve_linear(
    where: str, weight: Tensor, stats: GramStats, recipe: Recipe, grid: Grid | None = None
) -> tuple[QuantizedWeight, Record]:
    """One linear's answer, on the learned grid if there is one, and its journal record (without position and cost)."""
    weight = weight.float()
    stats.check(where)
    assert recipe.spec is not None
    given = {"grid": grid} if grid is not None else {}
    try:
        with products_in(recipe.precision):
            quantized = recipe.solver(weight, stats, recipe.spec, **given, **recipe.options).check()
    except SingularGramError as error:
        raise RunError(f"{where}: {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    damping = quantized.info.get("percdamp")
    if damping is not None and damping != recipe.options.get("percdamp", damping):
        log.warning("%s: the Gram matrix was singular, damping raised to %g", where, damping)
    error_now = relative_error(weight, quantized.dequantize(), stats.gram)
    nearest = quantized if recipe.solver is rtn else rtn(weight, stats, recipe.spec, **given)
    error_rtn = relative_error(weight, nearest.dequantize(), stats.gram)
    return quantized, {
        "shape": list(weight.shape),
        "method": recipe.method,
        "bits": recipe.spec.bits,
        "relative_error": error_now,
        "relative_error_rtn": error_rtn,
        "bits_per_weight": quantized.bits_per_weight(),
        "storage_bits": quantized.storage_bits(),
        "scale_bits": quantized.grid.scale_bits,
        "n_tokens": stats.n_tokens,
        "verdict": verdict(error_now, error_rtn, quantized.bits_per_weight()),
        "kernels": describe_kernels(weight.device),
        **ranges_of(weight, stats, quantized),
        **({"info": dict(quantized.info)} if quantized.info else {}),
    }


def ranges_of(weight: Tensor, stats: GramStats, quantized: QuantizedWeight) -> Record:
    """What makes a linear hard: root mean square of its input channels (median, largest), the largest weight over their
    root mean square, and the share of weights kept as outliers."""
    rms = (stats.diagonal / max(1, stats.n_tokens)).clamp(min=0).sqrt()
    if k := exponent_outside(weight):
        weight = weight * 2.0**-k  # its squares would overflow or vanish
    spread = float(weight.square().mean().sqrt())
    kept = 0 if quantized.outliers is None else quantized.outliers.value.numel()
    return {
        "input_rms": [float(rms.median()), float(rms.max())],
        "weight_peak": float(weight.abs().max()) / spread if spread else 0.0,
        "outlier_share": kept / weight.numel(),
    }


def verdict(error: float, error_rtn: float, bits: float) -> str:
    """``bad``: not finite, no output left, worse than round-to-nearest, or stored in as many bits as weights have that
    are not quantized; ``look``: above LOOK_ABOVE; else ``ok``."""
    if not math.isfinite(error) or error >= 1 or error > error_rtn * 1.05 + 1e-12 or bits >= FULL_BITS:
        return "bad"
    return "look" if error > LOOK_ABOVE else "ok"
