"""One block as a function of what is learned of it, so that its quantized form answers like the original.

    min over Θ of  loss(F(W, X), F(Q(T(W; Θ)), X̂))

with Θ the parameters of a list of parametrizations, F the block as a function of its weights, X the full-precision inputs and X̂ those behind the quantized prefix.
The weights that are trained are those that are deployed: `Learner.materialize` is the only path to them, and the
solver that follows gets the grid of the same formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.linears import LinearRef
from quant.blocks.weights import ONLINE_DTYPE, ONLINE_PARTS, BlockWeights
from quant.core.errors import InputError
from quant.core.grid import range_to_grid
from quant.core.rounding import RoundTo
from quant.core.types import Grid, QuantSpec
from quant.learn import ingredient
from quant.learn.config import Learning
from quant.learn.fake_quant import fake_quantize, grid_of, group_range
from quant.learn.parametrization import Block, InputRange, Parameters, Parametrization


@dataclass(frozen=True)
class LearnedBlock:
    """A block after learning, before its weights are rounded.

    weights: transformed, in the arithmetic's dtype. targets: float32 weights of the linears for the solver. grids:
    theirs; empty where weights stay in full precision. tensors: what a checkpoint holds otherwise than the original,
    besides the solved linears. parameters: what was learned. log: losses and events, numbers of matrices behind norms,
    and the seams that are shifted besides scaled.
    """

    weights: BlockWeights
    targets: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    tensors: BlockWeights
    parameters: Parameters
    log: Mapping[str, Any]


class Learner:
    """One block's trainable form: a list of parametrizations, and their parameters by ``<name>.<key>``.

    parameters: raw, as the optimizer moves them. *Effective* ones are what the weights depend on, and what is saved.
    start: effective parameters to continue from, instead of the usual start. Raises InputError if they do not fit.
    """

    def __init__(
        self,
        model: LazyModel,
        index: int,
        weights: BlockWeights,
        spec: QuantSpec | None,
        act: ActSpec,
        learning: Learning,
        ranges: Mapping[str, InputRange],
        start: Parameters | None = None,
    ) -> None:
        self.model, self.index, self.spec, self.act, self.learning = model, index, spec, act, learning
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.weights = weights.with_parameters(
            {k: t.to(wide) for k, t in weights.parameters.items() if t.is_floating_point()}
        )
        block = Block(model, index, weights, spec, learning)
        self.linears = block.linears
        self.gridded = {LinearRef.of_module(name).parameter: name for name in self.linears} if spec else {}
        self.parametrizations: list[Parametrization] = [
            part for make in ingredient.pick(learning.ingredients) for part in make(block)
        ]
        initial = [(part, part.initial(weights, ranges)) for part in self.parametrizations]
        self.keys = {part.name: tuple(own) for part, own in initial}
        assert len(self.keys) == len(initial), "two parametrizations of one name"
        parameters = _join(initial)
        self.resumed = start is not None
        if start is not None:
            parameters = self._raw(parameters, start)
        self.parameters = {k: p.to(wide).requires_grad_() for k, p in parameters.items()}

    def parts(self, parameters: Mapping[str, Tensor]) -> list[tuple[Parametrization, Parameters]]:
        """Every parametrization with those of the parameters that are its own, by key."""
        return [
            (part, {key: parameters[k] for key in self.keys[part.name] if (k := f"{part.name}.{key}") in parameters})
            for part in self.parametrizations
        ]

    def _raw(self, own: Parameters, start: Parameters) -> Parameters:
        """Raw parameters of effective ones. Raises InputError where names or shapes are not the block's own."""
        wrong = [k for k in {*own, *start} if k not in own or k not in start or own[k].shape != start[k].shape]
        if wrong:
            raise InputError(
                f"--resume: block {self.index} has other learned parameters ({sorted(wrong)[0]}, ...); "
                "give the same --lwc, --let, --use_matrix, --use_ln_matrix, bits and groups as the run that learned them"
            )
        start = {k: start[k].to(p.device, copy=True) for k, p in own.items()}  # the optimizer writes in place
        return _join((part, part.raw(effective)) for part, effective in self.parts(start))

    def _progress(self, progress: float) -> float:
        """Parameters that were learned before have their training behind them."""
        return 1.0 if self.resumed else progress

    def effective(self, parameters: Mapping[str, Tensor], progress: float) -> Parameters:
        """What is saved, and all that the weights depend on, at ``progress`` in [0, 1] of the training."""
        at = self._progress(progress)
        return _join((part, part.effective(raw, at)) for part, raw in self.parts(parameters))

    @torch.no_grad()
    def before_step(self) -> Parameters:
        """Copies of the parameters that `after_step` may put back."""
        names = [f"{part.name}.{key}" for part in self.parametrizations for key in part.guarded]
        return {k: self.parameters[k].clone() for k in names}

    @torch.no_grad()
    def after_step(self, before: Parameters, progress: float) -> None:
        """Let every parametrization correct what a step of the optimizer made of its parameters, in place."""
        at = self._progress(progress)
        for (part, raw), (_, old) in zip(self.parts(self.parameters), self.parts(before), strict=True):
            part.after_step(raw, old, at)

    def transform(self, effective: Mapping[str, Tensor]) -> BlockWeights:
        """The block's weights with every parametrization in them, not quantized, float32 (or float64)."""
        weights = self.weights
        for part, own in self.parts(effective):
            weights = part.apply(weights, own)
        return weights

    def scale_zero(self, linear: str, weight: Tensor, effective: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scale and zero point [out, G] of a linear's transformed weight [out, in], within what clips leave of its range."""
        assert self.spec is not None
        low, high = group_range(weight, self.spec)
        for part, own in self.parts(effective):
            low, high = part.clip(linear, low, high, own)
        return range_to_grid(low, high, self.spec)

    def materialize(self, effective: Mapping[str, Tensor]) -> BlockWeights:
        """The weights that the block is trained with and deployed with, in the arithmetic's dtype."""
        # 1. The same function with other numbers inside (and what compensates for rounding).
        weights = self.transform(effective)
        # 2. Weights of linears on their grids, which are those of the transformed weights.
        on_grids = {}
        for name, linear in self.gridded.items():
            assert self.spec is not None
            weight = weights.parameters[name]
            scale, zero = self.scale_zero(linear, weight, effective)
            on_grids[name] = fake_quantize(weight, scale, zero, self.spec.qmax)
        # 3. What a checkpoint makes of the numbers. Gradients pass 2 and 3 straight through.
        return self._round_as_stored(weights.with_parameters(on_grids))

    def _round_as_stored(self, weights: BlockWeights) -> BlockWeights:
        """As a checkpoint holds them, in the arithmetic's dtype."""

        def as_stored(tensor: Tensor, storage: torch.dtype) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return (tensor if tensor.dtype == storage else RoundTo.apply(tensor, storage)).to(self.model.dtype)

        parts = {"parameters": {name: as_stored(t, self._storage_of(name)) for name, t in weights.parameters.items()}}
        for part in ONLINE_PARTS:
            parts[part] = {name: as_stored(t, ONLINE_DTYPE) for name, t in getattr(weights, part).items()}
        return replace(weights, packed=weights.packed, **parts)

    def _storage_of(self, name: str) -> torch.dtype:
        return self.model.storage_of(name, self.index)

    def facts(self, effective: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the parametrizations say of the block: counts added up, of margins the smallest."""
        together: dict[str, Any] = {}
        for part, own in self.parts(effective):
            for name, value in part.facts(own).items():
                other = together.setdefault(name, value * 0 if isinstance(value, int) else value)
                together[name] = other + value if isinstance(value, int) else min(other, value)
        return together

    @torch.no_grad()
    def finish(self, effective: Parameters, record: Mapping[str, Any]) -> LearnedBlock:
        """The block with these parameters, for the solver."""
        weights = self.transform(effective)
        targets = {name: weights.weight(name) for name in self.linears}
        grids = {}
        if self.spec is not None:
            for name, weight in targets.items():
                scale, zero = self.scale_zero(name, weight, effective)
                grids[name] = grid_of(scale, zero, weight.shape[1], self.spec.qmax)
        # The solver's codes stand for the weights that have a grid; every other entry that is new is kept as it is.
        changed = weights.since(self.weights)
        kept = {name: t for name, t in changed.parameters.items() if name not in self.gridded}
        parts = {"parameters": {name: t.to(self._storage_of(name)) for name, t in kept.items()}}
        for part in ONLINE_PARTS:
            parts[part] = {name: t.to(ONLINE_DTYPE) for name, t in getattr(changed, part).items()}
        tensors = BlockWeights(packed={}, **parts)
        layout = self.model.family.heads(self.model.config)
        plain = len(tensors.named()) == len(tensors.parameters) + len(tensors.online)  # two a number, as ever
        flops = 0 if plain else weights.online_flops(layout.q[1].numel() + layout.k[1].numel())
        return LearnedBlock(
            weights=self._round_as_stored(weights),
            targets={name: weight.float() for name, weight in targets.items()},
            grids=grids,
            tensors=tensors,
            parameters={k: p.detach().clone() for k, p in effective.items()},
            log={
                **record,
                "online_parameters": tensors.online_numbers(),
                **({} if not flops else {"online_flops": flops}),
                "shifted": [k.removesuffix(".shift") for k in effective if k.endswith(".shift")],
            },
        )


def _join(parts: Iterable[tuple[Parametrization, Parameters]]) -> Parameters:
    """Parameters of all parts under their full names."""
    return {f"{part.name}.{key}": tensor for part, own in parts for key, tensor in own.items()}
