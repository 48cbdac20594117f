"""Tuning in a run (``--tune``): a block as soon as it is solved, or the whole model once every block is.

Tuned codes take the place of the solved ones in the blocks' files. While the model is tuned, tuning.safetensors beside
them holds where it stands; the solved codes stay until it is finished, so that a run that is killed at any moment goes on
and ends with the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.files import check_plain_file, write_atomically
from quant.core.types import QuantizedWeight
from quant.run.directory import TUNING, BlockSummary, Record, RunDirectory, answers_sha256
from quant.run.folding import folded_before
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress
from quant.run.linear import LinearRecord
from quant.run.quantize import SolvedBlock, deploy
from quant.tune.block import TunedBlock
from quant.tune.chain import Chain
from quant.tune.config import batch_of
from quant.tune.objectives import block_objective, language_objective, model_objective
from quant.tune.optimize import Objective, State, begin, optimize

KEEP_SECONDS = 60.0  # between states of a block that are kept: those of a large one are gigabytes
Value = TypeVar("Value")


def after_tuning(record: LinearRecord, answer: QuantizedWeight) -> LinearRecord:
    """A line of the journal with what tuning may change of it; errors and verdict stay those of the solved codes."""
    return replace(
        record,
        bits_per_weight=answer.bits_per_weight(),
        storage_bits=answer.storage_bits(),
        scale_bits=answer.grid.scale_bits,
        info=dict(answer.info),
    )


def within(index: int, values: Mapping[str, Value]) -> dict[str, Value]:
    """What is of a block by its names among several blocks', ``<index>.<name>``."""
    return {f"{index}.{name}": value for name, value in values.items()}


class BlockTuner:
    """The full-precision stream beside the quantized one, and every block tuned as it is solved. full: that stream, where
    there is one already; it moves on here."""

    def __init__(
        self, inputs: Inputs, stream: BlockStream, job: Job, progress: Progress, full: BlockStream | None = None
    ) -> None:
        assert job.recipe is not None and job.run.tuning is not None
        self.inputs, self.job, self.recipe, self.tuning = inputs, job, job.recipe, job.run.tuning
        self.progress, self.full = progress, full or stream.fork()
        outside, batch = inputs.model.outside_weights(inputs.device), batch_of(stream.tokens.shape[0])
        self.training, self.targets = (one.in_batches_of(batch, outside) for one in (stream, self.full))

    def pass_on(self, index: int, weights: BlockWeights) -> None:
        """Move full precision behind a block."""
        self.full.run(index, weights, advance=True)

    def tune(self, index: int, weights: BlockWeights, block: SolvedBlock) -> tuple[SolvedBlock, Record, float]:
        """The block with its tuned codes, how it went, and the seconds; full precision is behind it then."""
        started = time.perf_counter()
        assert self.recipe.spec is not None
        model, n_blocks, steps = self.inputs.model, self.job.n_blocks, self.tuning.steps
        self.pass_on(index, weights)
        start = weights | block.changed.to(weights.device, model.dtype)
        tuned = TunedBlock(model, index, start, block.solved, self.recipe.spec, self.tuning)
        objective = self._objective(index, tuned)
        kept = _Kept(self.job.target, f"{index} {answers_sha256(block.solved)}", rarely=True)

        def progress(step: int, _: int, now: float, first: float) -> None:
            note = f"block {index + 1} of {n_blocks}: held-out loss {now:.3e} (start {first:.3e})"
            self.progress("tune", index * steps + step, n_blocks * steps, note)

        state, before = kept.read(self.inputs.device, of_others=False)
        state = state or begin(objective, within(index, tuned.initial()), self.tuning.optimizer)
        rates, bounds = within(index, tuned.rates()), within(index, tuned.bounds())
        optimize(objective, state, rates, self.tuning, self.job.run.seed, kept.write, progress, bounds)
        best = tuned.own(state.best)
        answers, changed = tuned.answers(best), block.changed | tuned.changes_at(best)
        records = [after_tuning(record, answers[record.name]) for record in block.records]
        deployed = deploy(weights, answers, model, index, changed)
        tuned_block = replace(block, weights=deployed, solved=answers, changed=changed, records=records)
        return tuned_block, state.record(), before + time.perf_counter() - started

    def _objective(self, index: int, tuned: TunedBlock) -> Objective:
        """What a block is tuned for, full precision being behind it."""
        chain = Chain(self.training, {index: tuned}, self.recipe.act, self.tuning.recompute)
        model, last = self.inputs.model, self.tuning.last
        if last == "mse" or index + 1 < len(model.blocks):
            return block_objective(chain, self.full.hidden, self.tuning)
        outside = model.outside_weights(self.inputs.device)
        if last == "lm":
            return language_objective(chain, outside)
        return model_objective(chain, self.targets, outside)


def tune_model(inputs: Inputs, job: Job, progress: Progress) -> list[BlockSummary]:
    """Tune all blocks of the run directory together, where that is not done yet; their summaries.

    Raises InputError where some are tuned and what the others are to become is not there any more.
    """
    assert job.run.tuning is not None
    target, summaries = job.target, job.target.finished_blocks()
    waiting = [index for index, summary in enumerate(summaries) if not summary.tuning]
    if waiting:
        started, whole = time.perf_counter(), len(waiting) == len(summaries)
        blocks = _tuned_blocks(inputs, job, waiting)
        kept = _Kept(target, "".join(summary.codes_sha256 for summary in summaries) if whole else None)
        state, before = kept.read(inputs.device)
        if state is None or not state.is_finished(job.run.tuning.steps):
            if not whole:
                raise InputError(f"{kept.path} is missing, and some blocks are tuned already: --overwrite begins again")
            state = _optimize(inputs, job, blocks, state, kept, progress)
        spent = before + time.perf_counter() - started
        for block in blocks:
            _write(job, block, summaries[block.index], state, spent / job.n_blocks)
        summaries = target.finished_blocks()
    target.drop_tuning()
    return summaries


def _tuned_blocks(inputs: Inputs, job: Job, indices: list[int]) -> list[TunedBlock]:
    assert job.recipe is not None and job.recipe.spec is not None and job.run.tuning is not None
    model, spec = inputs.model, job.recipe.spec

    def start(index: int) -> BlockWeights:
        weights = folded_before(model, job.target, index, BlockWeights.read(model, index, inputs.device))
        return weights | job.target.read_changed(index).to(inputs.device, model.dtype)

    return [
        TunedBlock(
            model,
            index,
            start(index),
            {name: answer.to(inputs.device) for name, answer in job.target.read_weights(index).items()},
            spec,
            job.run.tuning,
        )
        for index in indices
    ]


def _optimize(
    inputs: Inputs, job: Job, blocks: list[TunedBlock], state: State | None, kept: _Kept, progress: Progress
) -> State:
    """All steps that are left."""
    assert job.run.tuning is not None
    objective = _objective(inputs, job, blocks)
    if state is None:
        state = begin(
            objective,
            {name: t for b in blocks for name, t in within(b.index, b.initial()).items()},
            job.run.tuning.optimizer,
        )
    rates = {name: rate for b in blocks for name, rate in within(b.index, b.rates()).items()}
    bounds = {name: ends for b in blocks for name, ends in within(b.index, b.bounds()).items()}

    def show(step: int, steps: int, now: float, first: float) -> None:
        progress("tune", step, steps, f"held-out divergence {now:.4f} (start {first:.4f})")

    return optimize(objective, state, rates, job.run.tuning, job.run.seed, kept.write, show, bounds)


def _objective(inputs: Inputs, job: Job, blocks: list[TunedBlock]) -> Objective:
    """The divergence from full precision, which passes the blocks first."""
    assert job.recipe is not None
    model, outside = inputs.model, inputs.model.outside_weights(inputs.device)
    stream = inputs.calibration_stream(job.run, job.target.path)
    start = stream.in_batches_of(batch_of(stream.tokens.shape[0]), outside)
    full, links = start.fork(), dict[int, TunedBlock | BlockWeights](enumerate(blocks))
    for index in range(len(model.blocks)):
        weights = BlockWeights.read(model, index, inputs.device)
        full.run(index, weights, advance=True)
        links.setdefault(index, weights)
    assert job.run.tuning is not None
    return model_objective(Chain(start, links, job.recipe.act, job.run.tuning.recompute), full, outside)


def _write(job: Job, block: TunedBlock, summary: BlockSummary, state: State, seconds: float) -> None:
    """Put the tuned codes of a block in the place of the solved ones."""
    own = block.own(state.best)
    answers = block.answers(own)
    records = [after_tuning(record, answers[record.name]) for record in summary.records]
    spent = dict(summary.seconds) | {"learn": summary.seconds.get("learn", 0.0) + seconds}
    changed = job.target.read_changed(block.index) | block.changes_at(own)
    learned = job.target.read_learned(block.index)
    job.target.write_block(
        block.index, answers, records, spent, changed=changed, learned=learned, tuning=state.record()
    )  # fmt: skip


@dataclass
class _Kept:
    """tuning.safetensors. solved: hashes of the codes that are tuned; None where some are replaced already. rarely: a state
    is written only where the last one is KEEP_SECONDS old (which states are there changes no bit)."""

    target: RunDirectory
    solved: str | None
    seconds: float = 0.0
    rarely: bool = False

    def __post_init__(self) -> None:
        self.started, self.path = time.perf_counter(), self.target.path / TUNING
        self.written = self.started

    def write(self, state: State) -> None:
        """Keep a state."""
        if self.rarely and time.perf_counter() - self.written < KEEP_SECONDS:
            return
        numbers = state.numbers() | {
            "solved": self.solved,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors().items()}
        write_atomically(self.path, save(tensors, {"format": "pt", "tuning": json.dumps(numbers)}))
        self.written = time.perf_counter()

    def read(self, device: torch.device, of_others: bool = True) -> tuple[State | None, float]:
        """The state that was kept and the seconds behind it; None where there is none. of_others: whether a state of other
        codes is a mistake; else it is one that is not needed any more. Raises InputError where it is damaged or of other
        codes."""
        check_plain_file(self.path)
        if not self.path.exists():
            return None, 0.0
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                numbers: Mapping[str, Any] = json.loads(file.metadata()["tuning"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state, self.seconds = State.of(tensors, numbers), float(numbers["seconds"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path} is damaged ({error}); delete it, and tuning begins again") from error
        if not of_others and self.solved != numbers["solved"]:
            self.seconds = 0.0
            return None, 0.0
        if self.solved not in (None, numbers["solved"]):
            raise InputError(
                f"{self.path} belongs to other codes than those beside it; delete it, and tuning begins again"
            )
        return state, self.seconds
