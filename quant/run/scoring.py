"""Perplexity and tasks of several jobs, and of full precision beside them, in one pass over the blocks each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from models.load import Weights
from quant.blocks.outside import Deployed, OutsideWeights
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.names import FULL_BITS
from quant.core.types import QuantizedWeight
from quant.evaluate.passes import FULL, Variant
from quant.evaluate.perplexity import Scores, evaluate
from quant.evaluate.perplexity import report as perplexity_entries
from quant.evaluate.scorer import Scorer
from quant.evaluate.tasks import TaskScore, run_tasks
from quant.evaluate.tasks import report as task_entries
from quant.export.read import QuantizedCheckpoint
from quant.kernels.matmul.pack import pack_block
from quant.run.directory import OUTSIDE, Record
from quant.run.identity import evaluation_of
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress, measure
from quant.run.loop import read_block
from quant.run.outside import deployed, packed_bytes, packed_outside
from quant.run.quantize import deploy
from quant.run.results import results_of

TASK_BATCH = 16  # sequences of a task that pass a block at a time; they are short


@dataclass
class FullPrecision:
    """What is kept of full precision between calls of `Session.run_all`, so that it is evaluated once: hidden states
    behind the last block by corpus, and scores by task."""

    streams: dict[str, BlockStream] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)


def score(inputs: Inputs, jobs: Sequence[Job], progress: Progress, full: FullPrecision) -> None:
    """Give every job the results of its codes, its perplexity and its tasks."""
    with measure(inputs.device, jobs, "evaluate") as evaluating:
        by_corpus = score_perplexity(inputs, jobs, progress, full.streams)
    with measure(inputs.device, jobs, "tasks") as answering:
        by_task = score_tasks(inputs, jobs, progress, full.tasks)
    for job in jobs:
        variant = str(job.target.path) if job.recipe else FULL
        no_corpus: Record = {"perplexity": {}, "fidelity": {}}
        results = results_of(job.run, job.blocks, inputs.model, inputs.rotation, job.outside)
        results |= perplexity_entries(inputs.evaluation, by_corpus, variant) if by_corpus else no_corpus
        results["zero_shot"] = task_entries(by_task, variant)
        results |= {"configuration_sha256": job.digest, "evaluation": evaluation_of(inputs, job.output)}
        results["seconds"] |= evaluating | answering
        results["packed_bytes"] = sum(job.packed_bytes.values())  # 0 where nothing was evaluated packed
        job.results = results


def score_perplexity(
    inputs: Inputs, jobs: Sequence[Job], progress: Progress, full_streams: dict[str, BlockStream]
) -> dict[str, dict[str, Scores]]:
    """Scores of every job (by its directory) and of full precision on every corpus, in one pass over the blocks."""
    variants = _variants(inputs, jobs)
    full = inputs.config.full_precision_eval
    if not jobs or not inputs.evaluation or not (variants or full):
        return {}
    return evaluate(
        inputs.model,
        inputs.evaluation,
        variants,
        device=inputs.device,
        batch=inputs.config.calib_batch,
        store=inputs.config.activation_store,
        directory=jobs[0].target.path,
        full=_full_variant(inputs, jobs[0]) if full else None,
        full_streams=full_streams,
        progress=lambda done, total: progress("evaluate", done, total, ""),
    )


def score_tasks(
    inputs: Inputs, jobs: Sequence[Job], progress: Progress, full_scores: dict[str, TaskScore]
) -> dict[str, dict[str, TaskScore]]:
    """Scores of every job and of full precision on every task. full_scores: full precision's, filled if empty."""
    if not jobs or inputs.tasks is None:
        return {}
    wanted = inputs.config.full_precision_eval and not full_scores
    full = {FULL: _full_variant(inputs, jobs[0])} if wanted else {}
    scorer = Scorer(
        inputs.model,
        full | _variants(inputs, jobs),
        inputs.device,
        TASK_BATCH,
        inputs.config.activation_store,
        jobs[0].target.path,
        lambda done, total: progress("tasks", done, total, ""),
    )
    scores = run_tasks(scorer, inputs.tokenizer, inputs.tasks)
    if wanted:
        full_scores |= {name: by_variant[FULL] for name, by_variant in scores.items()}
    return {n: scores.get(n, {}) | ({FULL: full_scores[n]} if n in full_scores else {}) for n in inputs.tasks.members}


def _variants(inputs: Inputs, jobs: Sequence[Job]) -> dict[str, Variant]:
    """The quantized form of every job, by its directory."""
    return {str(job.target.path): _variant(inputs, job) for job in jobs if job.recipe}


def _variant(inputs: Inputs, job: Job) -> Variant:
    """The quantized form of a job: its codes are read back from the run directory, block by block."""
    model, packed = inputs.model, job.output.packed and job.run.wbits != FULL_BITS

    def block(index: int, weights: BlockWeights) -> BlockWeights:
        if index >= job.n_blocks:
            return weights
        if not packed:
            return read_block(model, job.target, index, weights)
        changed = deploy(weights, {}, model, index, job.target.read_changed(index))
        return _pack(inputs, job, index, changed, job.target.read_weights(index))

    return Variant(block, job.run.act, packed and job.n_blocks == len(model.blocks), _outside(inputs, job, packed))


def _outside(inputs: Inputs, job: Job, packed: bool) -> Deployed | None:
    """What a job deploys outside the blocks; None where that is what the model has."""
    solved = job.solved_outside()
    if not solved:
        return None
    if packed:
        return lambda weights: _packed_outside(inputs, job, solved, weights)
    return lambda weights: OutsideWeights(deployed(inputs.model, solved, weights))


def _packed_outside(
    inputs: Inputs, job: Job, solved: Mapping[str, QuantizedWeight], weights: Weights
) -> OutsideWeights:
    """Embedding and head packed; their memory is noted in the job."""
    form = packed_outside(inputs.model, solved, weights)
    job.packed_bytes[OUTSIDE] = packed_bytes(form.modules)
    return form


def _full_variant(inputs: Inputs, job: Job) -> Variant:
    """The model itself; a quantized checkpoint may be asked to stay packed."""
    model, checkpoint = inputs.model, inputs.model.checkpoint
    if not (job.output.packed and isinstance(checkpoint, QuantizedCheckpoint)):
        return Variant(lambda _, weights: weights, inputs.act)
    whole = all(set(checkpoint.solved(model, i)) == set(model.linear_shapes(i)) for i in range(len(model.blocks)))

    def block(index: int, weights: BlockWeights) -> BlockWeights:
        return _pack(inputs, job, index, weights, checkpoint.solved(model, index))

    solved = checkpoint.solved_outside(model)
    beyond: Deployed | None = (lambda weights: _packed_outside(inputs, job, solved, weights)) if solved else None
    return Variant(block, inputs.act, whole, beyond)


def _pack(
    inputs: Inputs, job: Job, index: int, weights: BlockWeights, solved: Mapping[str, QuantizedWeight]
) -> BlockWeights:
    """A block with its solved linears packed; their memory is noted in the job."""
    packed = pack_block(solved, inputs.device)
    job.packed_bytes[index] = sum(weight.nbytes() for weight in packed.values())
    return weights.with_packed(packed)
