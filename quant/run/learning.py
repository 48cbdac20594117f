"""What was learned of blocks one by one, trained together for the whole model (``--whole_model``), and how they are solved then.

1. Every block is learned by itself, and rounded to nearest: its file holds what was learned. 2. All blocks are trained
together; learning.safetensors beside them holds where that stands. 3. Every block is solved with what came out of it, by the
solver that was asked for, and takes the place of the one before. A run that is killed at any moment ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn.column_scales import KEY
from quant.learn.learner import LearnedBlock, Learner
from quant.learn.parametrization import Parameters
from quant.learn.together import LearnedLink, any_ranges, corrections
from quant.run.directory import LEARNING, BlockSummary, Record
from quant.run.folding import exact_behind, exact_weights, folded_again, learned_behind
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress
from quant.run.kept import Kept
from quant.run.observe import original_behind
from quant.solvers import get_solver
from quant.tune.chain import Chain
from quant.tune.config import Tuning, batch_of
from quant.tune.limits import recomputes
from quant.tune.objectives import model_objective
from quant.tune.optimize import State, begin, optimize

TOGETHER = "together"  # entry of a block's log that says how all were trained


def one_by_one(job: Job) -> Job:
    """The job that learns every block by itself and rounds it to nearest."""
    assert job.recipe is not None
    plain: dict[str, Any] = {"options": {}, "saliency": 0, "bias_correction": False}
    run = replace(job.run, solver="rtn", target_correction=0.0, residual_correction=False, tuning=None, **plain)
    recipe = replace(job.recipe, solver=get_solver("rtn"), correction=None, **plain)
    return replace(job, run=run, recipe=recipe)


@dataclass(frozen=True)
class Together:
    """What all blocks learned together. parameters: effective ones by block, of those that are not solved with them yet;
    record: how it went; earlier: seconds by block, by stage; done: leading blocks that are solved with them."""

    parameters: Mapping[int, Parameters]
    record: Record = field(default_factory=dict)
    earlier: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    done: int = 0

    def added_to(self, index: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """Seconds of solving a block, by stage, and what it took before."""
        return {stage: own + self.earlier[index].get(stage, 0.0) for stage, own in seconds.items()}


def learn_model(inputs: Inputs, job: Job, progress: Progress) -> Together:
    """Train what was learned of the blocks of the run directory together, where that is not done yet.

    Raises InputError where some blocks are solved with what came out of it and the rest of that is not there any more.
    """
    assert job.run.learning is not None
    target, summaries = job.target, job.target.finished_blocks()
    waiting = [index for index, summary in enumerate(summaries) if TOGETHER not in summary.learning]
    started, whole = time.perf_counter(), len(waiting) == len(summaries)
    digest = "".join(summary.codes_sha256 for summary in summaries) if whole else None
    kept = Kept(target, digest, file=LEARNING, what="training")
    links = [LearnedLink(learner_of(inputs, job, index)) for index in range(len(summaries))] if whole else []
    state, before = kept.read(inputs.device)
    if state is None or not state.is_finished(job.run.learning.together):
        if not whole:
            raise InputError(f"{kept.path} is missing, and some blocks are solved already: --overwrite begins again")
        state = _optimize(inputs, job, links, state, kept, progress)
    links = links or [LearnedLink(learner_of(inputs, job, index)) for index in waiting]
    share = (before + time.perf_counter() - started) / len(summaries)
    earlier = {index: summaries[index].seconds for index in waiting}
    return Together(
        {link.index: link.effective(state.best) for link in links},
        state.record(),
        {index: {**own, "learn": own.get("learn", 0.0) + share} for index, own in earlier.items()},
        finished(summaries),
    )


def learner_of(inputs: Inputs, job: Job, index: int, start: Parameters | None = None) -> Learner:
    """What is trained of a block, from what its file says was learned of it, or from ``start``."""
    return _learner(inputs, job, index, None, start)


def _learner(
    inputs: Inputs, job: Job, index: int, exact: BlockWeights | None, start: Parameters | None = None
) -> Learner:
    model, recipe = inputs.model, job.recipe
    assert recipe is not None and recipe.learning is not None
    if exact is None:
        weights = BlockWeights.read(model, index, inputs.device)
        folded = folded_again(model, job.target, index, weights)
        exact = exact_weights(model, index, weights) if folded is None else exact_behind(folded)
    own = {name: t for name, t in job.target.read_learned(index).items() if not name.startswith(KEY)}
    return Learner(
        model,
        index,
        exact,
        recipe.spec,
        recipe.act,
        recipe.learning,
        any_ranges(model),
        own if start is None else start,
    )


def _optimize(
    inputs: Inputs, job: Job, links: list[LearnedLink], state: State | None, kept: Kept, progress: Progress
) -> State:
    """All steps that are left."""
    assert job.run.learning is not None and job.recipe is not None
    model, outside = inputs.model, inputs.model.outside_weights(inputs.device)
    steps = Tuning("model", job.run.learning.together)
    stream = inputs.calibration_stream(job.run, job.target.path)
    start = stream.in_batches_of(batch_of(stream.tokens.shape[0]), outside)
    recompute = recomputes(model, len(stream.tokens), inputs.seqlen, inputs.device)
    chain = Chain(start, {link.index: link for link in links}, job.recipe.act, recompute)
    objective = model_objective(chain, original_behind(start), outside)
    if state is None:
        initial = {name: tensor for link in links for name, tensor in link.initial().items()}
        state = begin(objective, initial, steps, "--whole_model")
    for link in links:
        link.take(state.parameters)
    rates = {name: rate for link in links for name, rate in link.rates().items()}

    def show(step: int, all_steps: int, now: float, first: float) -> None:
        progress("learn", step, all_steps, f"held-out divergence {now:.4f} (start {first:.4f})")

    return optimize(objective, state, rates, steps, job.run.seed, kept.write, show, correct=lambda: corrections(links))


class Taught:
    """Blocks as all of them learned them together, in the place of what each learns by itself."""

    def __init__(self, inputs: Inputs, job: Job, together: Together) -> None:
        self.inputs, self.job, self.together = inputs, job, together

    def learn(self, index: int, weights: BlockWeights, folded: LearnedBlock | None) -> LearnedBlock:
        """Block ``index``, to be solved."""
        start = self.together.parameters[index]
        exact = exact_weights(self.inputs.model, index, weights) if folded is None else exact_behind(folded)
        learner = _learner(self.inputs, self.job, index, exact, start)
        log = self.job.target.read_summary(index).learning
        learned = learner.finish(start, {**log, **learner.facts(start), TOGETHER: dict(self.together.record)})
        return learned if folded is None else learned_behind(folded, learned)

    def pass_on(self, index: int, weights: BlockWeights) -> None:
        """Nothing runs in full precision beside them."""


def finished(summaries: list[BlockSummary]) -> int:
    """How many of the leading blocks are solved with what all learned together."""
    return next((i for i, one in enumerate(summaries) if TOGETHER not in one.learning), len(summaries))
