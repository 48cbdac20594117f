"""A solved block as a function of what is tuned of it: its linears, and if they are asked for its norms and biases, and what
it computes with beside its weights.

Codes in code units are free of the basis that matrices in front of linears make: when those move, their readers' codes
follow by their own gradients (FlatQuant's pairs, arXiv 2410.09426, trained to the end with the codes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.linears import LinearRef
from quant.blocks.weights import ONLINE_DTYPE, ONLINE_PARTS, BlockWeights, is_online
from quant.core.rounding import RoundTo
from quant.core.types import QuantizedWeight, QuantSpec
from quant.tune.codes import Parameters, TunedLinear
from quant.tune.config import GRID_RATE, Tuning
from quant.tune.offsets import OffsetLinear

LINEARS: dict[str, type[TunedLinear] | type[OffsetLinear]] = {
    "position": TunedLinear,
    "offset": OffsetLinear,
}  # by `Tuning.form`
SHIFT = ".shift"  # name of what is added to a norm, a bias, a matrix or a clip, behind its own


class TunedBlock:
    """Block ``index`` from its solved answers.

    weights: of the block in full precision, with what else is deployed otherwise (changed); solved: by linear; targets:
    what linears were solved from, float32, where that is not their weight there.
    """

    def __init__(
        self,
        model: LazyModel,
        index: int,
        weights: BlockWeights,
        solved: Mapping[str, QuantizedWeight],
        spec: QuantSpec,
        tuning: Tuning,
        targets: Mapping[str, Tensor] = {},  # noqa: B006 (only read)
    ) -> None:
        self.model, self.index, self.tuning, self.weights = model, index, tuning, weights
        form = LINEARS[tuning.form]
        self.linears = {
            name: form(
                f"block {index} {name}",
                start,
                replace(spec.for_inputs(start.codes.shape[1]), bits=start.spec.bits),
                targets[name] if name in targets else weights.weight(name),
            )
            for name, start in solved.items()
        }
        solved_names = {LinearRef.of_module(name).parameter for name in solved}
        own = {name for name, _ in model.blocks[index].named_parameters()}
        self.moving = {
            name: tensor
            for name, tensor in weights.parameters.items()
            if tuning.norms and name in own - solved_names and tensor.is_floating_point()
        }
        if tuning.online:
            self.moving |= BlockWeights(**{part: getattr(weights, part) for part in ONLINE_PARTS}).named()
        self.names = [name + key for name, linear in self.linears.items() for key in linear.keys]
        self.names += [name + SHIFT for name in self.moving]

    def initial(self) -> Parameters:
        """Parameters, float32 by ``<name>.<key>``, that give the solved block."""
        parameters = {
            name + key: tensor for name, linear in self.linears.items() for key, tensor in linear.initial().items()
        }
        return parameters | {name + SHIFT: torch.zeros_like(own).float() for name, own in self.moving.items()}

    def rates(self) -> dict[str, float]:
        """The rate of every parameter."""
        rates = {name + key: rate for name, one in self.linears.items() for key, rate in one.rates(self.tuning).items()}
        return rates | {name + SHIFT: self.tuning.grid_rate or GRID_RATE for name in self.moving}

    def bounds(self) -> dict[str, tuple[float, float]]:
        """What parameters stay within, of those that do."""
        return {name + key: ends for name, linear in self.linears.items() for key, ends in linear.bounds().items()}

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy of the parameters of which `answers` and `changes_at` make the same, as small as it can be."""
        copies = {
            name + key: tensor
            for name, linear in self.linears.items()
            for key, tensor in linear.settled(self._of(name, parameters)).items()
        }
        return copies | {name + SHIFT: parameters[name + SHIFT].detach().clone() for name in self.moving}

    def own(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """Those of this block among several blocks', which are by ``<index>.<name>``."""
        return {name: parameters[f"{self.index}.{name}"] for name in self.names}

    def _of(self, name: str, parameters: Mapping[str, Tensor]) -> Parameters:
        return {key: parameters[name + key] for key in self.linears[name].keys}

    def weights_at(self, parameters: Mapping[str, Tensor]) -> BlockWeights:
        """The block's weights in the arithmetic's dtype, as its checkpoint holds them; gradients pass."""
        moved = self._moved(parameters)
        for name, linear in self.linears.items():
            moved[LinearRef.of_module(name).parameter] = linear.weight(self._of(name, parameters))
        return self.weights | BlockWeights.from_named(
            {name: RoundTo.apply(t, self._storage(name)).to(self.model.dtype) for name, t in moved.items()}
        )

    def _moved(self, parameters: Mapping[str, Tensor]) -> Weights:
        """Norms, biases, matrices and clips with what is added to them, float32."""
        return {name: own.float() + parameters[name + SHIFT] for name, own in self.moving.items()}

    def _storage(self, name: str) -> torch.dtype:
        return ONLINE_DTYPE if is_online(name) else self.model.storage_of(name, self.index)

    def answers(self, parameters: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
        """The linears' answers at these parameters."""
        return {name: linear.answer(self._of(name, parameters)) for name, linear in self.linears.items()}

    @torch.no_grad()
    def changes_at(self, parameters: Mapping[str, Tensor]) -> BlockWeights:
        """What is deployed otherwise than before besides the linears, as the checkpoint holds it."""
        return BlockWeights.from_named({name: t.to(self._storage(name)) for name, t in self._moved(parameters).items()})
