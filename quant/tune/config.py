"""How solved codes are tuned, as values. Runs keep these fields by name, and hash them: a name here does not change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.core.errors import InputError
from quant.core.names import TUNING_SCOPES

ITERATIONS = {"block": 200, "model": 400}
RATES = {1: 1e-2, 2: 1e-2, 3: 2.5e-3, 4: 1.5e-3}  # of positions, in code units, by bits of a code
FINER_RATE = 1e-3  # of more bits
BATCH, HELD_OUT = 8, 64  # windows of a step; held-out windows at most


@dataclass(frozen=True)
class Tuning:
    """What is tuned after solving, and how.

    scope: ``block``: every block as soon as it is solved, on its output; ``model``: all blocks together once all are
    solved, on the model's logits. iterations: steps of Adam (0: the scope's own number). rate: of positions, in code
    units (0: by the bits of a code). grid_rate: of scales, relative, and of norms. norms: gains and biases of norms and
    biases of linears move too; they stay in the checkpoint's dtype. drop: share of the largest errors of a block's output
    that do not count.
    """

    scope: str = "block"
    iterations: int = 0
    rate: float = 0.0
    grid_rate: float = 1e-3
    norms: bool = False
    drop: float = 1e-3

    def __post_init__(self) -> None:
        if self.scope not in TUNING_SCOPES:
            raise InputError(f"--tune {self.scope}: use {' or '.join(TUNING_SCOPES)}")
        rates = (self.rate, self.grid_rate, self.drop)
        if not isinstance(self.iterations, int) or self.iterations < 0 or not all(0 <= r < math.inf for r in rates):
            raise ValueError(
                "tuning takes whole steps from 0 on, and rates and a share that are finite and not negative"
            )

    @property
    def steps(self) -> int:
        """Steps of Adam."""
        return self.iterations or ITERATIONS[self.scope]

    def rate_of(self, bits: int) -> float:
        """The rate of positions on a grid of so many bits."""
        return self.rate or RATES.get(bits, FINER_RATE)


def batch_of(n_windows: int) -> int:
    """Windows of a step: BATCH, fewer where an eighth of all would be less. Raises InputError where none could be held out."""
    if n_windows < 2:
        raise InputError(f"--tune holds windows out and {n_windows} is too few to: raise --nsamples to 16 or more")
    return max(1, min(BATCH, n_windows // 8))


def split(batches: int, batch: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches that are trained on and of those that are held out: an eighth, spread evenly, of at most
    HELD_OUT windows."""
    count = max(1, min(batches // 8, HELD_OUT // batch))
    held = {(i + 1) * batches // count - 1 for i in range(count)}
    return [i for i in range(batches) if i not in held], sorted(held)
