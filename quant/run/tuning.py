"""Tuning in a run (``--tune``): a block, or a window of blocks, as soon as it is solved, or the whole model once all are.

Tuned codes take the place of the solved ones in the blocks' files. While the model is tuned, tuning.safetensors beside
them holds where it stands; the solved codes stay until it is finished, so that a run that is killed at any moment goes on
and ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.types import QuantizedWeight
from quant.run.directory import BlockSummary, answers_sha256
from quant.run.folding import folded_before, targets_before
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress
from quant.run.kept import Kept
from quant.run.linear import LinearRecord
from quant.run.observe import original_behind
from quant.run.quantize import deploy
from quant.run.solved import Solved
from quant.tune.block import TunedBlock
from quant.tune.chain import Chain
from quant.tune.config import batch_of
from quant.tune.objectives import block_objective, language_objective, model_objective
from quant.tune.optimize import Objective, State, begin, optimize

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


def tuner_of(
    inputs: Inputs, stream: BlockStream, job: Job, progress: Progress, full: BlockStream | None
) -> WindowTuner | None:
    """What tunes blocks while others wait for their turn; None where nothing is tuned, or all blocks in the end."""
    if job.run.tuning is None or job.tunes("model"):
        return None
    return WindowTuner(inputs, stream, job, progress, full)


class WindowTuner:
    """The full-precision stream beside the quantized one, and blocks tuned as soon as those of a window are solved; a window
    of one block is that block. full: that stream, where there is one already; it moves on here, and so does the quantized
    one.

    In a window of several, a block is solved behind those that are solved and not tuned yet; the next window begins behind
    tuned ones.
    """

    def __init__(
        self, inputs: Inputs, stream: BlockStream, job: Job, progress: Progress, full: BlockStream | None = None
    ) -> None:
        assert job.recipe is not None and job.run.tuning is not None
        self.inputs, self.job, self.recipe, self.tuning = inputs, job, job.recipe, job.run.tuning
        self.progress, self.stream, self.full = progress, stream, full or stream.fork()
        self.size, self.waiting = self.tuning.together(job.n_blocks), list[Solved]()
        self.start = stream if self.size == 1 else _beside(stream)  # in front of the window
        outside, batch = inputs.model.outside_weights(inputs.device), batch_of(stream.tokens.shape[0])
        self.training, self.targets = (one.in_batches_of(batch, outside) for one in (self.start, self.full))

    def pass_on(self, index: int, weights: BlockWeights) -> None:
        """Move full precision behind a block."""
        self.full.run(index, weights, advance=True)

    def add(self, solved: Solved) -> list[Solved]:
        """Take a block that was solved with the stream in front of it; the streams are behind it then, unless it is the
        last. The blocks that are finished with it."""
        index, apart = solved.index, self.start is not self.stream
        if apart and not self.waiting:
            _place(self.start, self.stream)
        self.pass_on(index, solved.weights)
        self.waiting.append(solved)
        if (index + 1) % self.size and index + 1 < self.job.n_blocks:
            self.stream.run(index, solved.block.weights, advance=True, act=self.recipe.act)
            solved.block = replace(solved.block, weights=BlockWeights())  # not asked for again
            return []
        window, self.waiting = self.waiting, []
        self._tune(window)
        if index + 1 < self.job.n_blocks:
            for one in window:
                self.start.run(one.index, one.block.weights, advance=True, act=self.recipe.act)
            if apart:
                _place(self.stream, self.start)
        return window

    def _tune(self, window: list[Solved]) -> None:
        """Give the blocks of a window their tuned codes, and how it went; full precision is behind them."""
        started = time.perf_counter()
        blocks = [self._tuned(one) for one in window]
        objective = self._objective(blocks)
        solved = " ".join(f"{one.index} {answers_sha256(one.block.solved)}" for one in window)
        kept = Kept(self.job.target, solved, rarely=True)
        state, before = kept.read(self.inputs.device, of_others=False)
        state = _steps(self.job, blocks, objective, state, kept, self._show(window))
        spent = (before + time.perf_counter() - started) / len(window)
        for one, tuned in zip(window, blocks, strict=True):
            best = tuned.own(state.best)
            answers, changed = tuned.answers(best), one.block.changed | tuned.changes_at(best)
            records = [after_tuning(record, answers[record.name]) for record in one.block.records]
            deployed = deploy(one.weights, answers, self.inputs.model, one.index, changed)
            one.block = replace(one.block, weights=deployed, solved=answers, changed=changed, records=records)
            one.tuning = state.record()
            one.seconds["learn"] += spent

    def _tuned(self, solved: Solved) -> TunedBlock:
        assert self.recipe.spec is not None
        model, block = self.inputs.model, solved.block
        start = solved.weights | block.changed.to(solved.weights.device, model.dtype)
        return TunedBlock(model, solved.index, start, block.solved, self.recipe.spec, self.tuning, solved.targets)

    def _show(self, window: list[Solved]) -> Callable[[int, int, float, float], None]:
        """What a person sees of a window."""
        first, last, n_blocks, steps = window[0].index + 1, window[-1].index + 1, self.job.n_blocks, self.tuning.steps
        done = (last - 1) // self.size * steps  # of the windows before
        total = -(-n_blocks // self.size) * steps
        names = f"block {last}" if first == last else f"blocks {first} to {last}"

        def show(step: int, _: int, now: float, start: float) -> None:
            self.progress(
                "tune", done + step, total, f"{names} of {n_blocks}: held-out loss {now:.3e} (start {start:.3e})"
            )

        return show

    def _objective(self, blocks: list[TunedBlock]) -> Objective:
        """What a window is tuned for, full precision being behind it."""
        chain = Chain(self.training, {b.index: b for b in blocks}, self.recipe.act, self.tuning.recompute)
        model, last = self.inputs.model, self.tuning.last
        if last == "mse" or blocks[-1].index + 1 < len(model.blocks):
            return block_objective(chain, self.full.hidden, self.tuning)
        outside = model.outside_weights(self.inputs.device)
        if last == "lm":
            return language_objective(chain, outside)
        return model_objective(chain, self.targets, outside)


def _beside(stream: BlockStream) -> BlockStream:
    """A second stream at the same place, with windows that are held out; its time counts as the first one's."""
    other = stream.fork()
    other.clock = stream.clock
    if stream.heldout is not None:
        other.attach(stream.heldout.fork())
    return other


def _place(stream: BlockStream, other: BlockStream) -> None:
    """Put a stream where another one of the same windows is."""
    stream.hidden.data.copy_(other.hidden.data)
    if stream.heldout is not None and other.heldout is not None:
        _place(stream.heldout, other.heldout)


def tune_model(inputs: Inputs, job: Job, progress: Progress) -> list[BlockSummary]:
    """Tune all blocks of the run directory together, where that is not done yet; their summaries.

    Raises InputError where some are tuned and what the others are to become is not there any more.
    """
    assert job.run.tuning is not None
    target, summaries = job.target, job.target.finished_blocks()
    waiting = [index for index, summary in enumerate(summaries) if not summary.tuning]
    if waiting:
        started, whole = time.perf_counter(), len(waiting) == len(summaries)
        blocks = [_tuned_block(inputs, job, index) for index in waiting]
        kept = Kept(target, "".join(summary.codes_sha256 for summary in summaries) if whole else None)
        state, before = kept.read(inputs.device)
        if state is None or not state.is_finished(job.run.tuning.steps):
            if not whole:
                raise InputError(f"{kept.path} is missing, and some blocks are tuned already: --overwrite begins again")

            def show(step: int, steps: int, now: float, first: float) -> None:
                progress("tune", step, steps, f"held-out divergence {now:.4f} (start {first:.4f})")

            state = _steps(job, blocks, _objective(inputs, job, blocks), state, kept, show)
        spent = before + time.perf_counter() - started
        for block in blocks:
            _write(job, block, summaries[block.index], state, spent / job.n_blocks)
        summaries = target.finished_blocks()
    target.drop_tuning()
    return summaries


def _tuned_block(inputs: Inputs, job: Job, index: int) -> TunedBlock:
    """A finished block of the run directory."""
    recipe, target, model = job.recipe, job.target, inputs.model
    assert recipe is not None and recipe.spec is not None and job.run.tuning is not None
    weights = BlockWeights.read(model, index, inputs.device)
    targets = targets_before(model, target, index, weights, recipe)
    start = folded_before(model, target, index, weights) | target.read_changed(index).to(inputs.device, model.dtype)
    solved = {name: answer.to(inputs.device) for name, answer in target.read_weights(index).items()}
    return TunedBlock(model, index, start, solved, recipe.spec, job.run.tuning, targets)


def _steps(
    job: Job,
    blocks: list[TunedBlock],
    objective: Objective,
    state: State | None,
    kept: Kept,
    show: Callable[[int, int, float, float], None],
) -> State:
    """All steps that are left of what is tuned together."""
    tuning = job.run.tuning
    assert tuning is not None
    if state is None:
        start = {name: t for b in blocks for name, t in within(b.index, b.initial()).items()}
        state = begin(objective, start, tuning)
    rates = {name: rate for b in blocks for name, rate in within(b.index, b.rates()).items()}
    bounds = {name: ends for b in blocks for name, ends in within(b.index, b.bounds()).items()}
    return optimize(objective, state, rates, tuning, job.run.seed, kept.write, show, bounds)


def _objective(inputs: Inputs, job: Job, blocks: list[TunedBlock]) -> Objective:
    """The divergence from full precision, which passes the blocks first; blocks that are not tuned stay as they are."""
    assert job.recipe is not None
    model, outside = inputs.model, inputs.model.outside_weights(inputs.device)
    stream = inputs.calibration_stream(job.run, job.target.path)
    start = stream.in_batches_of(batch_of(stream.tokens.shape[0]), outside)
    links = dict[int, TunedBlock | BlockWeights](enumerate(blocks))
    for index in range(len(blocks), len(model.blocks)):
        links[index] = BlockWeights.read(model, index, inputs.device)
    assert job.run.tuning is not None
    return model_objective(
        Chain(start, links, job.recipe.act, job.run.tuning.recompute), original_behind(start), outside
    )


def _write(job: Job, block: TunedBlock, summary: BlockSummary, state: State, seconds: float) -> None:
    """Put the tuned codes of a block in the place of the solved ones."""
    own = block.own(state.best)
    answers = block.answers(own)
    records = [after_tuning(record, answers[record.name]) for record in summary.records]
    spent = dict(summary.seconds) | {"learn": summary.seconds.get("learn", 0.0) + seconds}
    changed = job.target.read_changed(block.index) | block.changes_at(own)
    learned = job.target.read_learned(block.index)
    job.target.write_block(
        block.index, answers, records, spent, changed=changed, learned=learned, learning=summary.learning,
        tuning=state.record(),
    )  # fmt: skip
