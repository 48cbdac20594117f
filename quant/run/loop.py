"""The loop over blocks: solve in order what is not on disk yet, and carry the calibration samples forward."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from models.load import LazyModel
from quant.blocks.reading import BlockReader
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.learn.learner import LearnedBlock
from quant.learn.loop import learn_block
from quant.run.allocation import planned
from quant.run.calibration import calibration_stream, shortage
from quant.run.config import RunConfig
from quant.run.directory import BlockSummary, Record, RunDirectory
from quant.run.folding import exact_behind, exact_weights, fold_block, folded_again, folded_before, learned_behind
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress, measure
from quant.run.learning import Taught, Together, finished, learn_model, one_by_one
from quant.run.linear import LinearRecord
from quant.run.observe import original_beside
from quant.run.quantize import compare_block, deploy, quantize_block
from quant.run.resume import input_ranges
from quant.run.saliency import token_weights
from quant.run.solved import Solved, write_all
from quant.run.tuning import tune_model, tuner_of

log = logging.getLogger(__name__)


def quantize(inputs: Inputs, job: Job, progress: Progress) -> None:
    """Every block that the job quantizes is in its run directory afterwards."""
    with measure(inputs.device, [job], "quantize") as spent:
        job.blocks = _solved(inputs, job, progress) if job.recipe else []
        if job.tunes("model"):
            job.blocks = tune_model(inputs, job, progress)
        elif job.recipe and job.run.tuning:
            job.target.drop_tuning()
    job.seconds = spent["quantize"]


def _solved(inputs: Inputs, job: Job, progress: Progress) -> list[BlockSummary]:
    """Every block learned, where that is asked for, and solved."""
    target, learning = job.target, job.run.learning
    if learning is None or not learning.together:
        return _quantize_blocks(inputs, job, progress)
    if finished(target.finished_blocks()) < job.n_blocks:
        _quantize_blocks(inputs, one_by_one(job), progress)
        _quantize_blocks(inputs, job, progress, learn_model(inputs, job, progress))
    target.drop_learning()
    return target.finished_blocks()


def _quantize_blocks(
    inputs: Inputs, job: Job, progress: Progress, together: Together | None = None
) -> list[BlockSummary]:
    """Solve the blocks that are not on disk yet; finished ones only carry the calibration samples forward. together: what
    all blocks learned, with which they are solved."""
    target, n_blocks = job.target, job.n_blocks
    summaries = target.finished_blocks()[: None if together is None else together.done]
    if len(summaries) == n_blocks:
        progress("quantize", n_blocks, n_blocks, "finished before")
        return summaries
    assert job.recipe is not None
    if job.run.avg_bits is not None:
        job.recipe = planned(inputs, job, progress)
    recipe, act = job.recipe, job.recipe.act
    stream = calibration_stream(inputs, job.run, target.path)
    if (short := shortage(job.run, inputs.model.linear_shapes(), inputs.seqlen)) is not None:
        log.warning("%s", short)
    tokens = token_weights(stream, job.run, n_blocks, progress)
    learner = _learner(inputs, stream, job, progress, together)
    full = original_beside(stream) if recipe.asks_for_original else None
    tuner = None if job.tunes("model") else tuner_of(inputs, stream, job, progress, full)
    with BlockReader(inputs.model, inputs.device, n_blocks) as reader:
        for index in range(n_blocks):
            weights = reader.read(index)
            if index < len(summaries):
                note = "from disk"
                stream.run(index, read_block(inputs.model, target, index, weights), advance=True, act=act)
                weights = folded_before(inputs.model, target, index, weights)
                if learner is not None:
                    learner.pass_on(index, weights)
                if tuner is not None:
                    tuner.pass_on(index, weights)
            else:
                before, started = stream.clock.seconds, time.perf_counter()
                learned = _folded(stream, job, index, weights, together)
                if learned is not None:
                    weights = learned.weights
                if learner is not None:
                    learned = learner.learn(index, weights, learned)
                learning = time.perf_counter() - started if learned else 0.0
                block = quantize_block(stream, index, weights, recipe, learned, full, tokens)
                solved = Solved(index, weights, block, learned, {**block.seconds, "learn": learning})
                complete = [solved] if tuner is None else tuner.add(solved)
                if tuner is None and index + 1 < n_blocks:
                    stream.run(index, block.weights, advance=True, act=act)
                spent = stream.clock.seconds
                solved.seconds |= {k: spent[of] - before[of] for k, of in (("forward", "forward"), ("gram", "observe"))}
                if together is not None:
                    solved.seconds |= together.added_to(index, solved.seconds)
                summaries += write_all(target, complete)
                note = _note(block.records, learned)
            if tokens is not None:
                tokens.drop(index)
            if full is not None and tuner is None and index + 1 < n_blocks:
                full.run(index, weights, advance=True)
            progress("quantize", index + 1, n_blocks, note)
    return summaries


def _folded(
    stream: BlockStream, job: Job, index: int, weights: BlockWeights, together: Together | None
) -> LearnedBlock | None:
    """The block with scales in its columns, where they are asked for: those that something was learned on, or new ones."""
    if not job.run.column_scales:
        return None
    if together is not None:
        return folded_again(stream.model, job.target, index, weights)
    return fold_block(stream, index, weights)


def _learner(
    inputs: Inputs, stream: BlockStream, job: Job, progress: Progress, together: Together | None
) -> _Pair | Taught | None:
    """What learns the blocks, or knows what they learned together; None where nothing is learned."""
    if job.run.learning is None:
        return None
    return _Pair(inputs, stream, job, progress) if together is None else Taught(inputs, job, together)


def read_block(model: LazyModel, target: RunDirectory, index: int, weights: BlockWeights) -> BlockWeights:
    """The weights that a finished block deploys, from the codes on disk."""
    solved, changed = target.read_weights(index), target.read_changed(index)
    return deploy(weights, solved, model, index, changed)


def _note(records: Sequence[LinearRecord], learned: LearnedBlock | None) -> str:
    """What a person sees of a finished block."""
    errors = [record.relative_error for record in records]
    error = f"relative error {sum(errors) / len(errors):.4f}" if errors else ""
    log = learned.log if learned else {}
    loss = f"loss {log['loss_start']:.3e} -> {log['loss_end']:.3e}" if log else ""
    return ", ".join(part for part in (loss, error) if part)


class _Pair:
    """The two streams of learning: full precision, and the quantized prefix in training batches."""

    def __init__(self, inputs: Inputs, quantized: BlockStream, job: Job, progress: Progress) -> None:
        assert job.recipe is not None and job.recipe.learning is not None
        self.inputs, self.job, self.recipe, self.progress = inputs, job, job.recipe, progress
        self.learning = job.recipe.learning
        self.quantized, self.full = quantized, quantized.fork()
        outside = inputs.model.outside_weights(inputs.device)
        self.training = quantized.in_batches_of(self.learning.batch // ranks.size(), outside)
        self.start = None if job.run.resume is None else RunDirectory(job.run.resume)

    def pass_on(self, index: int, weights: BlockWeights) -> None:
        """Move full precision behind a block."""
        self.full.run(index, weights, advance=True)

    def learn(self, index: int, weights: BlockWeights, folded: LearnedBlock | None) -> LearnedBlock:
        """Learn block ``index`` from the usual start, or from the parameters of the run that is resumed. folded: the block
        where scales were folded into it before, with these weights."""
        n_blocks, epochs = self.job.n_blocks, self.learning.epochs

        def progress(epoch: int, _: int, now: float, first: float) -> None:
            note = f"block {index + 1} of {n_blocks}: loss {now:.3e} (start {first:.3e})"
            self.progress("learn", index * epochs + epoch, n_blocks * epochs, note)

        learned = learn_block(
            self.full,
            self.quantized,
            self.training,
            index,
            weights,
            self.recipe.spec,
            self.recipe.act,
            self.learning,
            exact=exact_weights(self.inputs.model, index, weights) if folded is None else exact_behind(folded),
            ranges=input_ranges(self.job.run, self.inputs.model, index),
            start=None if self.start is None else self.start.read_learned(index),
            progress=progress,
        )
        return learned if folded is None else learned_behind(folded, learned)


def compare_layers(inputs: Inputs, runs: Sequence[RunConfig], progress: Progress) -> list[Record]:
    """Journal records of every method for every linear, all from the Gram matrices of the full-precision stream.

    Nothing is kept on disk; the blocks stay as they are, so that every method sees the same inputs.
    """
    recipes = [inputs.recipe(run) for run in runs]
    n_blocks = min(runs[0].num_layers, len(inputs.model.blocks))
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as directory:
        stream = calibration_stream(inputs, runs[0], Path(directory))
        with BlockReader(inputs.model, inputs.device, n_blocks) as reader:
            for index in range(n_blocks):
                weights = reader.read(index)
                records += [record.to_json() for record in compare_block(stream, index, weights, recipes)]
                if index + 1 < n_blocks:
                    stream.run(index, weights, advance=True)
                progress("compare", index + 1, n_blocks, "")
    return records
