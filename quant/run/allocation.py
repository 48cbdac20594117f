"""Mixed bits in a run (``--avg-bits``): a width for every linear, decided once before anything is solved.

One backward pass of the full-precision model over the calibration windows (`quant.blocks.backward`), with labels that the
model draws. As it comes to a block, every linear is solved at every candidate width from the block's own full-precision
inputs; the errors D that are left cost the model ½ E[(Σ_t g_tᵀ D x_t)²] a window, to second order (its divergence). Costs
of linears add up. Linears that read one input (queries, keys and values; gate and up) share a width, as runtimes fuse them.
The cheapest choice within the stored bits, scales and zero points counted, is exact (`quant.core.knapsack`). The same
layout as AutoScheme's of AutoRound, with solved errors and the model's own labels in place of rounding and the text's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.blocks.backward import Labels, backward
from quant.blocks.linears import LinearRef
from quant.blocks.saliency import Sensitivities
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.files import write_atomically
from quant.core.knapsack import choose
from quant.core.linalg import objective
from quant.learn.column_scales import unfold
from quant.run.content import candidate_widths
from quant.run.directory import PLAN
from quant.run.folding import fold_block
from quant.run.inputs import Inputs
from quant.run.job import Job, Progress
from quant.run.observe import observe
from quant.run.solving import Recipe, name_errors, solve, store_in_float16
from quant.run.statistics import Original

Widths = dict[tuple[int, str], int]  # bits by block and linear
DRAWS = 2  # labels of every position; one window is one sample of each


def planned(inputs: Inputs, job: Job, progress: Progress) -> Recipe:
    """The recipe of a run with the width of every linear, from bits.json in its directory, which is made where it is not
    there. Raises InputError where that is damaged, or where no choice fits."""
    assert job.recipe is not None
    stored = job.target.read(PLAN)
    if stored is None:
        stored = _plan(inputs, job, progress)
        write_atomically(job.target.path / PLAN, (json.dumps(stored, indent=1) + "\n").encode())
    shapes, blocks = inputs.model.linear_shapes(), stored.get("bits")
    widths = candidate_widths(job.run, shapes)

    def is_whole(own: Any) -> bool:
        return isinstance(own, dict) and own.keys() == shapes.keys() and all(bits in widths for bits in own.values())

    if not isinstance(blocks, list) or len(blocks) != job.n_blocks or not all(map(is_whole, blocks)):
        raise InputError(f"{job.target.path / PLAN} is damaged; --overwrite begins again")
    return replace(job.recipe, widths={(i, name): own[name] for i, own in enumerate(blocks) for name in own})


class _Candidates:
    """Solves a block at every width as the backward pass comes to it. stored: bits of the answers, by block and linear."""

    def __init__(self, job: Job, widths: Sequence[int]) -> None:
        assert job.recipe is not None and job.recipe.spec is not None
        # in full precision there is nothing to correct
        self.job, self.recipe, self.widths = job, replace(job.recipe, correction=None, saliency=0), widths
        self.stored: dict[tuple[int, str], list[int]] = {}

    @torch.no_grad()
    def __call__(self, index: int, weights: BlockWeights, stream: BlockStream) -> Mapping[str, Sequence[Tensor]]:
        """Errors [out, in] of every linear at every width."""
        if index >= self.job.n_blocks:
            return {}
        folded = fold_block(stream, index, weights) if self.job.run.column_scales else None
        start = weights if folded is None else folded.weights
        groups = stream.model.groups
        same = Original(stream, start) if self.recipe.asks_for_original else None
        stats = observe(stream, index, start, groups, self.recipe.act, same)
        errors: dict[str, list[Tensor]] = {name: [] for group in groups for name in group}
        for bits in self.widths:
            solved = {}
            for group in groups:
                calibration = stats[group[0]].calibration
                for name in group:
                    weight = (start.weight(name) if folded is None else folded.targets[name]).float()
                    with name_errors(f"block {index} {name} at {bits} bits"):
                        calibration.check(f"block {index} {name}")
                        answer, _, _ = solve(weight, calibration, self.recipe.with_bits(bits))
                    answer = store_in_float16(answer, weight, partial(objective, gram=calibration.gram))
                    self.stored.setdefault((index, name), []).append(answer.storage_bits())
                    solved[LinearRef.of_module(name).parameter] = answer.dequantize()
            block = start.with_parameters(solved)
            if folded is not None:  # the backward pass is of the block as it was
                block = unfold(stream.model, block, folded.parameters)
            for name, own in errors.items():
                own.append(block.weight(name).float() - weights.weight(name).float())
        return errors


def _plan(inputs: Inputs, job: Job, progress: Progress) -> dict[str, Any]:
    """What bits.json holds: bits by block and linear, what they cost and take, and what the others would."""
    run, model, n_blocks = job.run, inputs.model, job.n_blocks
    assert run.avg_bits is not None
    shapes = model.linear_shapes()
    candidates = _Candidates(job, candidate_widths(run, shapes))
    stream = inputs.calibration_stream(run, job.target.path)
    labels = Labels(draws=DRAWS, seed=run.seed)
    found = Sensitivities(stream, labels.count, candidates)
    backward(stream, labels, [found], lambda done, total: progress("plan", done, total, "widths of the linears"))
    costs = {(i, name): own[name].per_window.tolist() for i, own in found.by_block.items() for name in own}
    items = [[(i, name) for name in group] for i in range(n_blocks) for group in model.groups]
    options = [
        [
            (sum(candidates.stored[one][k] for one in group), sum(costs[one][k] for one in group))
            for k in range(len(candidates.widths))
        ]
        for group in items
    ]
    weights = n_blocks * sum(out * n_in for out, n_in in shapes.values())
    try:
        chosen = choose(options, int(run.avg_bits * weights))
    except ValueError as error:
        least = sum(min(size for size, _ in own) for own in options) / weights
        raise InputError(
            f"--avg-bits {run.avg_bits:g}: what was solved takes at least {least:.3f} bits a weight ({error})"
        ) from error
    bits = {one: candidates.widths[k] for group, k in zip(items, chosen, strict=True) for one in group}
    names = [name for group in model.groups for name in group]
    return {
        "avg_bits": run.avg_bits,
        "bits_per_weight": sum(own[k][0] for own, k in zip(options, chosen, strict=True)) / weights,
        "cost": sum(own[k][1] for own, k in zip(options, chosen, strict=True)),
        "candidates": list(candidates.widths),
        "bits": [{name: bits[i, name] for name in names} for i in range(n_blocks)],
        "costs": [{name: costs[i, name] for name in names} for i in range(n_blocks)],
    }
