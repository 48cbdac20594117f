"""Learning the transforms and clips of one block, so that its quantized form answers like the original.

    min over Θ of  loss(F(W, X), F(Q(T(W; Θ)), X̂))

with F the block as a function of its weights, X the full-precision inputs and X̂ those behind the quantized prefix.
The weights that are trained are those that are deployed: `Learner.materialize` is the only path to them, and the
solver that follows gets the grid of the same formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.actquant import ONLINE, ActSpec
from quant.core.errors import InputError
from quant.core.rounding import RoundTo
from quant.core.types import Grid, QuantSpec
from quant.learn import affine as seams
from quant.learn.clip import clip_logits, clipped_grid, clipped_scale_zero, quantize_through
from quant.learn.config import Learning
from quant.learn.transforms import (
    InputRange,
    Parameters,
    transforms_for,
)

COMPENSATED_FIRST, COMPENSATED_LAST, COMPENSATION_LR = 3, 4, 1e-2


@dataclass(frozen=True)
class LearnedBlock:
    """A block after learning, before its weights are rounded.

    weights: transformed, in the arithmetic's dtype. targets: float32 weights of the linears for the solver. grids:
    theirs; empty where weights stay in full precision. tensors: what a checkpoint holds otherwise than the original,
    besides the solved linears. parameters: what was learned. log: losses and events, numbers of matrices behind norms,
    and the seams that are shifted besides scaled.
    """

    weights: Weights
    targets: Weights
    grids: Mapping[str, Grid]
    tensors: Weights
    parameters: Parameters
    log: Mapping[str, Any]


class Learner:
    """One block's trainable form. ``start`` continues from learned parameters instead of the usual start.

    Raises InputError if ``start`` does not fit.
    """

    def __init__(
        self,
        model: LazyModel,
        index: int,
        weights: Weights,
        spec: QuantSpec | None,
        act: ActSpec,
        learning: Learning,
        ranges: Mapping[str, InputRange],
        start: Parameters | None = None,
    ) -> None:
        self.model, self.index, self.spec, self.act, self.learning = model, index, spec, act, learning
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.weights = {k: t.to(wide) if t.is_floating_point() else t for k, t in weights.items()}
        self.linears = [name for group in model.groups for name in group]
        self.transforms = transforms_for(model.family, model.config, weights, learning.transform)
        parameters: Parameters = {}
        for transform in self.transforms:
            parameters |= transform.initial(weights, ranges)
        if learning.clip and spec is not None:
            for name in self.linears:
                lower, upper = clip_logits(weights[f"{name}.weight"], spec)
                parameters |= {f"clip.{name}.lower": lower, f"clip.{name}.upper": upper}
        if learning.compensation and self._compensates():
            n_out, n_in = weights[f"{self.linears[-1]}.weight"].shape
            device = weights[f"{self.linears[-1]}.weight"].device
            parameters[f"rank1.{self.linears[-1]}.left"] = torch.zeros(n_out, 1, device=device)
            parameters[f"rank1.{self.linears[-1]}.right"] = torch.ones(1, n_in, device=device)
        self.resumed = start is not None
        if start is not None:
            parameters = self._checked(parameters, start)
        self.parameters = {k: p.to(wide).requires_grad_() for k, p in parameters.items()}
        # Steps of single rows of matrices that were taken back; counted on the device, read when the block is done.
        self.rejected = torch.zeros((), dtype=torch.int64, device=next(iter(weights.values())).device)

    def _compensates(self) -> bool:
        return self.index < COMPENSATED_FIRST or self.index >= len(self.model.blocks) - COMPENSATED_LAST

    def _checked(self, own: Parameters, start: Parameters) -> Parameters:
        """Learned parameters as raw ones. Raises InputError where names or shapes differ."""
        wrong = [k for k in {*own, *start} if k not in own or k not in start or own[k].shape != start[k].shape]
        if wrong:
            raise InputError(
                f"--resume: block {self.index} has other learned parameters ({sorted(wrong)[0]}, ...); "
                "give the same --lwc, --let, --use_matrix, --use_ln_matrix, bits and groups as the run that learned them"
            )
        raw = {k: p.to(own[k].device) for k, p in start.items()}
        for name in (f"{t.name}.matrix" for t in self.transforms if f"{t.name}.matrix" in raw):
            diagonal = torch.diag_embed(raw[name].diagonal(dim1=-2, dim2=-1))
            raw[name] = diagonal + (raw[name] - diagonal) / self.learning.transform.stability
        return raw

    def effective(self, parameters: Mapping[str, Tensor], progress: float) -> Parameters:
        """Parameters with the gradual masks in them: what is saved, and all that the weights depend on."""
        found = dict(parameters)
        for transform in self.transforms:
            found = transform.masked(found, 1.0 if self.resumed else progress)
        return found

    def transformed(self, effective: Mapping[str, Tensor]) -> Weights:
        """The block's weights with all transforms in them, not quantized, float32 (or float64)."""
        weights = self.weights
        for transform in self.transforms:
            weights = transform.apply(weights, effective)
        last = self.linears[-1]
        if f"rank1.{last}.left" in effective:
            added = effective[f"rank1.{last}.left"] * effective[f"rank1.{last}.right"]
            weights = {**weights, f"{last}.weight": weights[f"{last}.weight"] + added}
        return weights

    def clip(self, effective: Mapping[str, Tensor], linear: str) -> tuple[Tensor | None, Tensor | None]:
        """Logits of both ends of a linear's range."""
        return effective.get(f"clip.{linear}.lower"), effective.get(f"clip.{linear}.upper")

    def materialize(self, effective: Mapping[str, Tensor]) -> Weights:
        """The weights that the block is trained with and deployed with, in the arithmetic's dtype."""
        found = {}
        for name, tensor in self.transformed(effective).items():
            linear, _, part = name.rpartition(".")
            if self.spec is not None and part == "weight" and linear in self.linears:
                scale, zero = clipped_scale_zero(tensor, self.spec, *self.clip(effective, linear))
                tensor = quantize_through(tensor, scale, zero, self.spec.qmax)
            found[name] = self._stored(name, tensor)
        return found

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """As a checkpoint holds it."""
        if not tensor.is_floating_point():
            return tensor
        kept = self._kept_dtype(name)
        if kept != tensor.dtype:
            tensor = RoundTo.apply(tensor, kept)
        return tensor.to(self.model.dtype)

    def _kept_dtype(self, name: str) -> torch.dtype:
        """In which a checkpoint holds an entry of floating-point numbers that no solver rounds."""
        return seams.ONLINE_DTYPE if name.endswith(ONLINE) else self.model.storage_dtype

    @torch.no_grad()
    def finish(self, effective: Parameters, record: Mapping[str, Any]) -> LearnedBlock:
        """The block with these parameters, for the solver."""
        transformed = self.transformed(effective)
        solved = {f"{name}.weight" for name in self.linears} if self.spec is not None else set()
        changed = {k: t for k, t in transformed.items() if k not in solved and t is not self.weights.get(k)}
        keep = {k: t.to(self._kept_dtype(k)) for k, t in changed.items()}
        online = sum(t.numel() for k, t in keep.items() if k.endswith(ONLINE))
        grids = {}
        if self.spec is not None:
            for name in self.linears:
                weight = transformed[f"{name}.weight"]
                grids[name] = clipped_grid(weight, self.spec, *self.clip(effective, name))
        return LearnedBlock(
            weights={k: self._stored(k, t) for k, t in transformed.items()},
            targets={name: transformed[f"{name}.weight"].float() for name in self.linears},
            grids=grids,
            tensors=keep,
            parameters={k: p.detach().clone() for k, p in effective.items()},
            log={**record, "online_parameters": online, "shifted": [t.name for t in self.transforms if t.shift]},
        )
