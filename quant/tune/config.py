"""How solved codes are tuned, as values. Runs keep these fields by name, and hash them: a name here does not change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from quant.core.errors import InputError
from quant.core.names import LAST_LOSSES, OPTIMIZERS, STATES, TUNING_SCOPES

ITERATIONS = {"block": 200, "window": 200, "model": 400}
RATES = {1: 1e-2, 2: 1e-2, 3: 2.5e-3, 4: 1.5e-3}  # of positions, in code units, by bits of a code
FINER_RATE = 1e-3  # of more bits
GRID_RATE = 1e-3
FORMS = ("position", "offset")  # `codes.TunedLinear` and `offsets.OffsetLinear`
LATER = (
    "form",
    "optimizer",
    "last",
    "recompute",
    "window",
    "state",
    "online",
)  # fields that earlier runs have not: they count where they differ
BATCH, HELD_OUT = 8, 64  # windows of a step; held-out windows at most


@dataclass(frozen=True)
class Tuning:
    """What is tuned after solving, and how.

    scope: ``block``: every block as soon as it is solved, on its output; ``window``: so many blocks as soon as the last of
    them is solved, together, on its output; ``model``: all blocks together once all are solved, on the model's logits.
    window: how many blocks, 1 but for ``window``. iterations: steps (0: the scope's own number). rate: of positions or offsets, in code
    units (0: by the bits of a code, with the sign one over the steps). grid_rate: of scales, relative, and of norms (0: of
    factors of ranges, that of offsets). norms: gains and biases of norms and biases of linears move too; they stay in the
    checkpoint's dtype. drop: share of the largest errors of a block's output that do not count. form: what moves: positions
    of weights and scales of any solver, or AutoRound's offsets and ranges. optimizer: Adam, or the gradient's sign.
    last: what the last block, or window, of a model is tuned for where blocks are: its own output (``mse``), the divergence of the
    model's logits (``kl``), or the language loss (``lm``, as AutoRound's second version may). recompute: blocks keep their
    inputs alone for the backward pass. state: what Adam's moments are kept in, float32 (``full``) or bfloat16 (``half``).
    online: matrices and clips that a block computes with beside its weights move too.
    """

    scope: str = "block"
    iterations: int = 0
    rate: float = 0.0
    grid_rate: float = GRID_RATE
    norms: bool = False
    drop: float = 1e-3
    form: str = "position"
    optimizer: str = "adam"
    last: str = "mse"
    recompute: bool = False
    window: int = 1
    state: str = STATES[0]
    online: bool = False

    def __post_init__(self) -> None:
        if self.scope not in TUNING_SCOPES:
            raise InputError(f"--tune {self.scope}: use {', '.join(TUNING_SCOPES)}")
        if not isinstance(self.window, int) or self.window < 1 or (self.window > 1 and self.scope != "window"):
            raise InputError(f"--tune {self.scope}:{self.window}: use window:K, with K blocks from 1 on")
        for name, allowed in (("form", FORMS), ("optimizer", OPTIMIZERS), ("last", LAST_LOSSES), ("state", STATES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"--tune-{name} {getattr(self, name)}: use {', '.join(allowed)}")
        rates = (self.rate, self.grid_rate, self.drop)
        if not isinstance(self.iterations, int) or self.iterations < 0 or not all(0 <= r < math.inf for r in rates):
            raise ValueError(
                "tuning takes whole steps from 0 on, and rates and a share that are finite and not negative"
            )

    def to_json(self) -> dict[str, Any]:
        """What decides the codes: all fields, of later ones those that are not the default."""
        usual = {field.name: field.default for field in fields(self)}
        return {name: v for name, v in asdict(self).items() if name not in LATER or v != usual[name]}

    @property
    def name(self) -> str:
        """What --tune calls its scope."""
        return f"window:{self.window}" if self.scope == "window" else self.scope

    def together(self, n_blocks: int) -> int:
        """How many blocks of so many are tuned at a time."""
        return n_blocks if self.scope == "model" else min(self.window, n_blocks)

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return self.iterations or ITERATIONS[self.scope]

    def rate_of(self, bits: int) -> float:
        """The rate of positions on a grid of so many bits."""
        usual = 1 / self.steps if self.optimizer == "sign" else RATES.get(bits, FINER_RATE)
        return self.rate or usual


AUTOROUND_TUNING = Tuning("block", 200, grid_rate=0.0, drop=0.0, form="offset", optimizer="sign")  # arXiv 2309.05516


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
