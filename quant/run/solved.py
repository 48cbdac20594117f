"""A block between its solution and its file: what waits for others where several are tuned together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quant.blocks.weights import BlockWeights
from quant.learn.learner import LearnedBlock
from quant.run.directory import BlockSummary, Record, RunDirectory
from quant.run.quantize import SolvedBlock


@dataclass
class Solved:
    """A solved block. weights: in full precision; block: its answers; learned: what was learned before, or folded;
    seconds: by stage; tuning: how that went, once it did."""

    index: int
    weights: BlockWeights
    block: SolvedBlock
    learned: LearnedBlock | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tuning: Record | None = None

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """What the linears were solved from, float32 [out, in], where that is not in ``weights``: what was learned."""
        return {} if self.learned is None or not self.learned.grids else self.learned.targets


def write_all(target: RunDirectory, blocks: Sequence[Solved]) -> list[BlockSummary]:
    """Keep blocks that were finished together, and say so in their order. The first is written last: until then the run
    goes on in front of it, as a run does whose blocks end there."""
    summaries = [_write(target, block) for block in reversed(blocks)]
    if len(blocks) > 1:
        target.finished_blocks()  # lines of the journal in order
    return summaries[::-1]


def _write(target: RunDirectory, solved: Solved) -> BlockSummary:
    block, learned = solved.block, solved.learned
    return target.write_block(
        solved.index,
        block.solved,
        block.records,
        solved.seconds,
        changed=block.changed,
        learned=None if learned is None else learned.parameters,
        learning=None if learned is None else learned.log,
        tuning=solved.tuning,
    )
