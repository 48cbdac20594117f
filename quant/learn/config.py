"""What is learned, as values. Runs keep these fields by name, and hash them: a name here does not change."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quant.core.errors import InputError
from quant.core.names import ONLINE_ROTATIONS, ROTATIONS

ONLINE = frozenset(("kronecker", "heads", "activation clips"))  # ingredients that stay beside the weights


@dataclass(frozen=True)
class TransformSpec:
    """What is asked for at the seams of a model.

    let: whether anything is transformed. kinds: at which seams; a recipe fills in its own where there are none.
    matrix: dense matrices for each head on ``qk`` and ``vo``; norm_matrix: a dense matrix behind
    every norm. shift: where the family can hold it. alpha: SmoothQuant's exponent of the starting scale. tied: q/k
    scales that commute with rotary embeddings (the released codes' do not, and change the function). stability:
    factor of matrix entries off the diagonal. precise: inverses in float64.
    """

    let: bool = False
    kinds: tuple[str, ...] = ()
    matrix: bool = False
    norm_matrix: bool = False
    shift: bool = False
    alpha: float = 0.5
    tied: bool = True
    stability: float = 1.0
    precise: bool = False


@dataclass(frozen=True)
class Learning:
    """What is learned for every block, and how. A paper's method is one value of it.

    transform: at which seams, in which form. clip: learnable clipping of both ends of every weight group.
    compensation: a matrix of rank one added to the last linear of the first 3 and last 4 blocks (ABQ-LLM).
    augmented: the loss also asks for the full-precision block's answer to the quantized prefix (``--aug_loss``).
    distribution, attention: ABQ-LLM's log-cosine and attention terms. patience: epochs without a better loss after
    which a block is done; 0 trains them all. decay: the rates fall by a cosine to a thousandth. extra_ingredients,
    extra_terms: registered ones without a field here. together: steps that all blocks are trained together afterwards,
    on the logits of the whole model.
    """

    transform: TransformSpec = field(default_factory=TransformSpec)
    clip: bool = False
    compensation: bool = False
    epochs: int = 10
    let_lr: float = 5e-3
    lwc_lr: float = 1e-2
    weight_decay: float = 0.0
    batch: int = 1
    augmented: bool = False
    distribution: bool = False
    attention: bool = False
    patience: int = 0
    extra_ingredients: tuple[str, ...] = ()
    extra_terms: tuple[str, ...] = ()
    decay: bool = False
    together: int = 0

    def __post_init__(self) -> None:  # from JSON they come as lists
        for name in ("extra_ingredients", "extra_terms"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """What a run's configuration holds, and hashes, of it."""
        extra = (
            "extra_ingredients",
            "extra_terms",
            "decay",
            "together",
        )  # absent in runs that were made before there were any
        return {k: v for k, v in asdict(self).items() if v or k not in extra}

    @property
    def ranges(self) -> bool:
        """Whether the starting scales need the ranges of the inputs."""
        return (self.transform.let and bool(self.transform.kinds)) or "values" in self.extra_ingredients

    @property
    def online(self) -> bool:
        """Whether something is learned that no weight holds, so that it stays in the model beside them."""
        return self.transform.norm_matrix or not ONLINE.isdisjoint(self.extra_ingredients)

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Names of the parametrizations, in the order in which they reach the weights."""
        asked = {"let": self.transform.let, "clip": self.clip, "compensation": self.compensation}
        return (*(name for name, taken in asked.items() if taken), *self.extra_ingredients)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the terms of the loss, in the order in which they are added up."""
        papers = {"distribution": self.distribution, "attention": self.attention}
        return ("reconstruction", *(name for name, taken in papers.items() if taken), *self.extra_terms)


@dataclass(frozen=True)
class Rotation:
    """What of a model is rotated before anything is solved, by random Hadamard matrices of a seed (QuaRot, Ashkboos et al.
    2024, arXiv 2404.00456).

    kinds: ``residual`` (the stream between the blocks), ``vo`` (values and what the output projection reads, every head of
    keys and values by itself), ``qk`` (queries and keys behind rotary embedding, as the model runs), ``down`` (what the last linear of
    a block reads, as the model runs). steps: in which those of ``residual`` and ``vo`` are learned from there, on the logits
    of the whole quantized model (SpinQuant, Liu et al. 2024, arXiv 2405.16406).
    """

    kinds: tuple[str, ...] = ROTATIONS
    seed: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in ROTATIONS:
                raise InputError(f"--rotate {kind}: use {', '.join(ROTATIONS)} or all")
        object.__setattr__(
            self, "kinds", tuple(kind for kind in ROTATIONS if kind in self.kinds)
        )  # one order, one name

    def to_json(self) -> dict[str, Any]:
        """What a run's configuration holds, and hashes, of it: steps that earlier runs have not, where there are any."""
        return {name: value for name, value in asdict(self).items() if value or name != "steps"}

    @property
    def online(self) -> tuple[str, ...]:
        """The kinds that no weight can hold."""
        return tuple(kind for kind in self.kinds if kind in ONLINE_ROTATIONS)
