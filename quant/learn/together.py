"""All blocks of a model as functions of what is learned of them, to be trained together on the answer of the whole model.

    min over Θ of all blocks of  mean over positions of KL(p(· | F(W)) ‖ p(· | F(Q(T(W; Θ)))))

FlatQuant (Sun et al., arXiv 2410.09426), like the methods before it, trains block by block on squared errors; what the blocks
do to the logits together none of them sees. The weights inside are rounded to nearest, straight through, as they are
where blocks are trained one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.weights import BlockWeights
from quant.learn.learner import Learner
from quant.learn.parametrization import InputRange, Parameters

SHARE = 0.6  # of the rates at which blocks are trained one by one: 3e-3 of transforms and 3e-2 of clips for FlatQuant's


class LearnedLink:
    """A block of a chain, by its parameters as the optimizer moves them."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.index = learner, learner.index

    def initial(self) -> Parameters:
        """The parameters that it starts from, by ``<index>.<name>``."""
        return {f"{self.index}.{name}": tensor.detach() for name, tensor in self.learner.parameters.items()}

    def rates(self) -> dict[str, float]:
        """The rate of every parameter, by the same names."""
        parts = self.learner.parts(self.learner.parameters)
        return {f"{self.index}.{part.name}.{key}": SHARE * part.rate for part, own in parts for key in own}

    def own(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """Those of this block among those of all."""
        return {name: parameters[f"{self.index}.{name}"] for name in self.learner.parameters}

    def weights_at(self, parameters: Mapping[str, Tensor]) -> BlockWeights:
        """The weights that are deployed with its own parameters; gradients pass."""
        return self.learner.materialize(self.learner.effective(parameters, 1.0))

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy of its own parameters."""
        return {name: tensor.detach().clone() for name, tensor in parameters.items()}

    @torch.no_grad()
    def effective(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """What is saved, of the parameters of all blocks."""
        return {name: t.detach() for name, t in self.learner.effective(self.own(parameters), 1.0).items()}

    def take(self, parameters: Mapping[str, Tensor]) -> None:
        """Let the learner hold the very tensors that the optimizer moves, so that it may correct them."""
        self.learner.parameters = self.own(parameters)


def corrections(links: Sequence[LearnedLink]) -> Callable[[], None]:
    """In front of a step of the optimizer: what every parametrization makes of it, to be called behind it."""
    before = [link.learner.before_step() for link in links]

    def correct() -> None:
        for link, own in zip(links, before, strict=True):
            link.learner.after_step(own, 1.0)

    return correct


def any_ranges(model: LazyModel) -> dict[str, InputRange]:
    """Ranges of inputs for parameters that start elsewhere: only their shapes count."""
    return {name: InputRange(torch.ones(n), torch.zeros(n)) for name, (_, n) in model.linear_shapes().items()}
