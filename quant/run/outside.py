"""Head and embedding in a run (``--head-bits``, ``--embedding-bits``): quantized once every block is, with the same solver.

The head is a linear whose inputs are the hidden states behind the last norm: its Gram matrix is theirs, over the calibration
windows as the quantized blocks give them. A row of the embedding is looked up and multiplied with nothing, so that no inputs
say which of its columns matter: it is rounded row by row, on grids whose range is searched with columns of equal weight.
Where both are one tensor, that is solved as the head. Rows are solved a part at a time, where a solver's rows do not depend
on each other: a vocabulary is many times as long as any other linear.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.load import LazyModel, Weights
from models.vocabulary import vocabulary_of
from quant.blocks.outside import OutsideWeights, with_modules
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.env import peak_bytes
from quant.core.errors import RunError
from quant.core.finite import all_finite
from quant.core.gram import GramStats
from quant.core.linalg import objective
from quant.core.names import UNPACKED
from quant.core.parts import row_parts, stacked
from quant.core.sample import InputSample
from quant.core.types import QuantizedWeight
from quant.export.formats import OutsideMatrix
from quant.kernels.matmul.pack import pack_weight
from quant.kernels.matmul.rows import PackedEmbedding, PackedRows
from quant.kernels.matmul.weight import Layout, PackedLinear
from quant.run.calibration import calibration_stream
from quant.run.content import PART, outside_matrices, spec_outside
from quant.run.directory import OUTSIDE, BlockSummary
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress
from quant.run.linear import LinearRecord, besides, verdict, weight_peak
from quant.run.loop import read_block
from quant.run.observe import original_beside
from quant.run.solving import Recipe, solve_linear
from quant.run.statistics import HELDOUT_TOKENS, InputStats
from quant.solvers import declaration_for
from quant.solvers.rtn import rtn

SEARCHED = "mse"  # how the range of an embedding's grids is found
STAGE = "head"


def quantize_outside(inputs: Inputs, job: Job, progress: Progress) -> BlockSummary | None:
    """Quantize what the run asks for outside the blocks, which all are in the run directory; None where that is nothing.

    Always from the codes on disk, so that a run that was stopped before comes to the same bits.
    """
    wanted = outside_matrices(job.run, vocabulary_of(inputs.model.module) if job.run.beyond_blocks else None)
    if not wanted or job.recipe is None:
        return None
    behind = hashlib.sha256("".join(block.codes_sha256 for block in job.blocks).encode()).hexdigest()
    if (summary := job.target.finished_outside(behind)) is not None:
        return summary
    steps = len(inputs.model.blocks) + len(wanted)
    progress(STAGE, 0, steps, "")
    solved: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    seconds = {"forward": 0.0, "gram": 0.0, "measure": 0.0}
    for done, (name, matrix) in enumerate(wanted.items(), 1):
        if matrix.multiplied:
            stats = _inputs_of_head(inputs, job, solved, _Passing(progress, done - 1, steps), seconds)
        else:
            stats = InputStats(GramStats.from_gram(torch.eye(matrix.shape[1], device=inputs.device)))
        started = time.perf_counter()
        solved[name], record = _solve(inputs.model, name, stats, _recipe(job, matrix), inputs.device)
        seconds["measure"] += besides(started, [record])
        records.append(record)
        note = f"{name}: relative error {record.relative_error:.4f}"
        progress(STAGE, steps if done == len(wanted) else done, steps, note)
    seconds |= {"solve": sum(record.seconds for record in records), "learn": 0.0}
    return job.target.write_block(OUTSIDE, solved, records, seconds, behind=behind)


def _recipe(job: Job, matrix: OutsideMatrix) -> Recipe:
    """How one matrix is solved: as the run's linears but for what belongs to blocks, or rounded with a searched range."""
    assert job.recipe is not None and job.recipe.spec is not None
    largest = job.recipe.spec.largest
    spec = replace(spec_outside(job.run, matrix.bits).for_inputs(matrix.shape[1]), largest=largest)
    plain = replace(job.recipe, spec=spec, learning=None, saliency=0, widths=None, bias_correction=False)
    if matrix.multiplied:
        return plain
    return replace(plain, method="rtn", solver=rtn, spec=replace(spec, range=SEARCHED), options={}, correction=None)


@dataclass(frozen=True)
class _Passing:
    """Progress of the calibration windows through the blocks, of which each is a step behind those before."""

    progress: Progress
    before: int
    steps: int

    def report(self, blocks: int) -> None:
        """So many blocks are passed."""
        self.progress(STAGE, self.before + blocks, self.steps, "calibration windows behind the blocks")


def _inputs_of_head(
    inputs: Inputs,
    job: Job,
    solved: Mapping[str, QuantizedWeight],
    passing: _Passing,
    seconds: dict[str, float],
) -> InputStats:
    """Statistics of what the head reads: behind the quantized blocks, and beside it in the original model where the recipe
    asks for that. solved: the embedding, where it is quantized by itself."""
    model, recipe = inputs.model, job.recipe
    assert recipe is not None
    head = vocabulary_of(model.module).head
    stream = calibration_stream(inputs, job.run, job.target.path)
    full = original_beside(stream) if recipe.asks_for_original else None
    outside = model.outside_weights(inputs.device)
    own = deployed(model, solved, outside)
    if solved:
        for one in (stream, stream.heldout):
            if one is not None:
                one.arguments = []
                one.capture(own)
    for index in range(len(model.blocks)):
        weights = BlockWeights.read(model, index, inputs.device)
        quantized = read_block(model, job.target, index, weights) if index < job.n_blocks else weights
        stream.run(index, quantized, advance=True, act=recipe.act)
        if full is not None:
            full.run(index, weights, advance=True)
        passing.report(index + 1)
    stats = GramStats(vocabulary_of(model.module).head_shape[1], inputs.device)
    _observe(stream, full, head, own, outside, stats)
    stats.add_up(full is not None)
    sample = None
    if (heldout := stream.heldout) is not None:
        sample = InputSample(-(-heldout.tokens.numel() // HELDOUT_TOKENS))
        _observe(heldout, None if full is None else full.heldout, head, own, outside, sample)
    spent = stream.clock.seconds
    seconds |= {"forward": spent["forward"], "gram": spent["observe"]}
    return InputStats(stats, sample)


def _observe(
    stream: BlockStream,
    full: BlockStream | None,
    head: str,
    own: Weights,
    outside: Weights,
    stats: GramStats | InputSample,
) -> None:
    """Add what the head reads in a stream behind the last block, and in the original's at the same tokens."""
    with stream.clock.spent("observe"):
        for rows in stream.rows:
            x = stream.head_inputs(head, rows, own)
            stats.update(x, None if full is None else full.head_inputs(head, rows, outside))


def _solve(
    model: LazyModel, name: str, stats: InputStats, recipe: Recipe, device: torch.device
) -> tuple[QuantizedWeight, LinearRecord]:
    """The answer for all rows, solved in parts of at most PART weights, and its line of the journal: as of a block behind
    the last."""
    weight = model.checkpoint.read(model.key(f"{name}.weight"))
    assert recipe.spec is not None
    alone = declaration_for(recipe.solver).rows_coupled or recipe.spec.shared_rows > 1
    parts = row_parts(weight.shape[0], 1 if alone else -(-weight.numel() // PART))
    answers, records, energies = [], [], []
    for rows in parts:
        own = weight[rows].to(device, model.dtype)
        answer, record = solve_linear(len(model.blocks), name, own, stats, recipe)
        answers.append(answer.to("cpu"))
        records.append(record)
        energies.append(_energies(own.float(), stats))
    whole = answers[0] if len(answers) == 1 else stacked(answers)
    peak = peak_bytes(device)
    record = records[0] if len(records) == 1 else _of_parts(records, energies, whole, weight)
    return whole, replace(record, peak_bytes=peak["device"] or peak["host"])


def _energies(weight: Tensor, stats: InputStats) -> tuple[float, float]:
    """‖WX‖² of a part over the tokens that are solved with, and over those that are held out: what errors are relative to."""
    sample = stats.heldout
    return objective(weight, stats.calibration.gram), 0.0 if sample is None else sample.norm(weight)


def _of_parts(
    records: Sequence[LinearRecord], energies: Sequence[tuple[float, float]], whole: QuantizedWeight, weight: Tensor
) -> LinearRecord:
    """The line of all parts: errors weighted by what they are relative to."""

    def mean(field: str, which: int) -> float | None:
        given = [getattr(record, field) for record in records]
        total = sum(energy[which] for energy in energies)
        if None in given:
            return None
        return sum(x * e[which] for x, e in zip(given, energies, strict=True)) / total if total else 0.0

    errors: dict[str, Any] = {name: mean(name, 0) for name in ("relative_error", "relative_error_rtn")}
    errors |= {f"{name}_heldout": mean(f"{name}_heldout", 1) for name in errors}
    judged = "relative_error" if errors["relative_error_heldout"] is None else "relative_error_heldout"
    nearest = judged.replace("error", "error_rtn")
    bits, first = whole.bits_per_weight(), records[0]
    kept = 0 if whole.outliers is None else whole.outliers.value.numel()
    return replace(
        first,
        shape=(weight.shape[0], weight.shape[1]),
        bits_per_weight=bits,
        storage_bits=whole.storage_bits(),
        scale_bits=whole.grid.scale_bits,
        verdict=verdict(errors[judged], errors[nearest], bits, first.rank is not None),
        weight_peak=weight_peak(weight.float()),
        outlier_share=kept / weight.numel(),
        seconds=round(sum(record.seconds for record in records), 4),
        info=whole.info,
        **errors,
    )


def deployed(model: LazyModel, solved: Mapping[str, QuantizedWeight], outside: Weights) -> Weights:
    """The weights outside the blocks with those of solved modules in place: as a checkpoint holds them, each rounded to its
    own dtype there, in the arithmetic's. Raises RunError, with the tensor's name, where a number is not finite there."""
    changed = dict(outside)
    for module, answer in solved.items():
        name = f"{module}.weight"
        stored = answer.to(outside[name].device).dequantize().to(model.storage_of(name)).to(model.dtype)
        if not all_finite(stored):
            raise RunError(
                f"{name}: not every value is finite in {model.storage_of(name)}, as it is saved, and {model.dtype}"
            )
        changed[name] = stored
    return changed


def packed_modules(
    model: LazyModel,
    solved: Mapping[str, QuantizedWeight],
    bias: Tensor | None,
    device: torch.device,
    layout: Layout | None = None,
) -> dict[str, nn.Module]:
    """Modules with packed weights for what was solved, by the places that they stand in: of a tied tensor two, each in the
    form that it is read in. bias, layout: of the head."""
    if not solved:
        return {}
    vocabulary = vocabulary_of(model.module)
    modules: dict[str, nn.Module] = {}
    for name, answer in solved.items():
        if name == vocabulary.head or vocabulary.tied:
            modules[vocabulary.head] = _head(answer, bias, device, model.dtype, layout)
        if name == vocabulary.embedding:
            embedding = model.module.get_submodule(name)
            assert isinstance(embedding, nn.Embedding)
            modules[name] = PackedEmbedding(embedding, PackedRows.of(answer, device), model.dtype)
    return modules


def _head(
    answer: QuantizedWeight, bias: Tensor | None, device: torch.device, dtype: torch.dtype, layout: Layout | None
) -> nn.Module:
    """A head with packed weights; of a kind that no packed product is of, with those written out."""
    if answer.spec.kind not in UNPACKED:
        return PackedLinear(pack_weight(answer, device, layout), bias)
    head = nn.Linear(answer.codes.shape[1], answer.codes.shape[0], bias is not None, device="meta")
    head.weight = nn.Parameter(answer.to(device).dequantize().to(dtype), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head


def packed_outside(
    model: LazyModel, solved: Mapping[str, QuantizedWeight], outside: Weights, layout: Layout | None = None
) -> OutsideWeights:
    """The weights outside the blocks with packed modules for what was solved; layout: of the head, where it is another."""
    bias = outside.get(f"{vocabulary_of(model.module).head}.bias") if solved else None
    device = next(iter(outside.values())).device
    return with_modules(outside, packed_modules(model, solved, bias, device, layout))


def packed_bytes(modules: Mapping[str, nn.Module]) -> int:
    """Memory of the packed weights of such modules."""
    held = [module.packed for module in modules.values() if isinstance(module, PackedLinear | PackedEmbedding)]
    return sum(weight.nbytes() for weight in held)
