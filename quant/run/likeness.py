"""Whether a model of an unknown type computes what the family says that ``--family`` names: tried on its first blocks.

All of it in float64 on a few random tokens: the streamed logits against those of the model's own call, which linears read the
same input and in which order, a random rescaling at every seam, what adds to the residual stream, and a rotation of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.family import ResidualStream, Seam
from models.load import LazyModel, build_meta
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.export.read import QuantizedCheckpoint
from quant.learn.affine import Affine, apply_seam, rotate

BLOCKS, WINDOWS, TOKENS = 2, 2, 16
CLOSE = 1e-5  # relative: many norms are computed in float32 whatever they are given; a wrong place moves 1e-3 and more
CPU = torch.device("cpu")


def check_family(model: LazyModel, trust_remote_code: bool = False) -> None:
    """Raise InputError, which says what differs, where the first blocks of a model do not compute what its family says.

    A checkpoint with codes is not tried: the model that it was made of was.
    """
    if isinstance(model.checkpoint, QuantizedCheckpoint) or model.checkpoint.extra:
        return
    generator = torch.Generator().manual_seed(0)
    wide = replace(model, module=build_meta(model.config, torch.float64, trust_remote_code), dtype=torch.float64)
    ids = torch.randint(model.rows, (WINDOWS, min(TOKENS, model.max_length)), generator=generator)
    blocks = list(wide.blocks)[:BLOCKS]
    with wide.replaced_blocks(blocks):
        trial = Trial(wide, ids)
        trial.check_logits()
        trial.check_groups()
        for seam in model.family.seams(model.config):
            trial.check_seam(seam, generator)
        trial.check_residual(generator)


class Trial:
    """The first blocks of a model with some tokens in front of the first."""

    def __init__(self, model: LazyModel, ids: Tensor) -> None:
        self.model, self.ids, self.outside = model, ids, model.outside_weights(CPU)
        self.stream = BlockStream(model, ids, device=CPU, batch=len(ids)).capture(self.outside)
        self.weights = BlockWeights.read(model, 0, CPU)
        self.layout = model.family.heads(model.config)

    def fail(self, what: str) -> InputError:
        """The message for what differs."""
        family, config = self.model.family.model_types[0], self.model.config
        return InputError(f"this {config.model_type} model is none of the family {family}: {what}; leave --family out")

    def answer(self, weights: BlockWeights, hidden: Tensor | None = None) -> Tensor:
        """What the first block makes of the tokens, with these weights."""
        with torch.no_grad():
            return self.stream.call(0, weights.parameters, slice(0, len(self.ids)), self.stream.arguments[0], hidden)

    def check_same(self, answer: Tensor, expected: Tensor, what: str) -> None:
        """Raise InputError where two answers are not the same but for rounding."""
        if not float((answer - expected).norm()) <= CLOSE * float(expected.norm()):
            raise self.fail(what)

    def check_logits(self) -> None:
        """Block by block the logits are those of the model's own call."""
        model, stream = self.model, self.stream.fork()
        whole = dict(self.outside)
        for index in range(len(model.blocks)):
            prefix = f"{model.family.blocks}.{index}."
            whole |= {prefix + name: tensor for name, tensor in model.block_weights(index, CPU).items()}
            stream.run(index, BlockWeights.read(model, index, CPU), advance=True)
        with torch.no_grad():
            own = functional_call(model.module, whole, (self.ids,), {"use_cache": False}).logits
        streamed = stream.logits(slice(0, len(self.ids)), self.outside)
        self.check_same(streamed.double(), own.double(), "block by block its logits are others")

    def seen(self, weights: BlockWeights) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        """Inputs and outputs of the modules of the first block by name, and the linears in order of execution."""
        inputs, outputs, order, handles = {}, {}, [], []

        def keep(name: str, linear: bool) -> Callable[..., None]:
            def hook(module: nn.Module, given: tuple, output: object) -> None:
                if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                    inputs[name], outputs[name] = given[0].clone(), output.clone()
                    order.extend([name] * linear)

            return hook

        for name, module in self.model.blocks[0].named_modules():
            handles.append(module.register_forward_hook(keep(name, isinstance(module, nn.Linear))))
        try:
            self.answer(weights)
        finally:
            for handle in handles:
                handle.remove()
        return inputs, outputs, order

    def check_groups(self) -> None:
        """Linears of a group read one input, and groups stand in order of execution."""
        inputs, _, order = self.seen(self.weights)
        groups = self.model.family.groups(self.model.config)
        for first, *others in groups:
            if any(not torch.equal(inputs[first], inputs[other]) for other in others):
                raise self.fail(f"{', '.join((first, *others))} do not read the same")
        starts = [min(order.index(name) for name in group) for group in groups]
        if starts != sorted(starts):
            raise self.fail(f"its linears run in the order {', '.join(order)}")

    def check_seam(self, seam: Seam, generator: torch.Generator) -> None:
        """A random factor for every channel, taken back by the readers, changes nothing."""
        shape = self.layout.k[1].shape
        if seam.kind not in ("vo", "qk"):
            shape = torch.Size((1, self.weights.weight(seam.consumers[0]).shape[1]))
        scale = torch.exp(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64))
        if seam.kind == "qk" and self.layout.rope:
            scale = scale[:, : shape[1] // 2].repeat(1, 2)
        changed = apply_seam(self.weights, seam, self.layout, Affine(scale), self.model.family.norm_offset)
        what = (
            f"{' and '.join(dict.fromkeys((*seam.producers, *seam.consumers)))} cannot be rescaled against each other"
        )
        self.check_same(self.answer(changed), self.answer(self.weights), what)

    def check_residual(self, generator: torch.Generator) -> None:
        """Attention and MLP add to the residual stream where the family says; and the stream can be rotated if it says so."""
        family, config, answer = self.model.family, self.model.config, self.answer(self.weights)
        if places := family.residual_at(config):
            inputs, outputs, _ = self.seen(self.weights)
            (attention, first), (mlp, second) = places.items()
            total = inputs[second].reshape(answer.shape) + outputs[mlp].reshape(answer.shape)
            what = f"{mlp} does not add to what {second} reads"
            if first == second:  # side by side: the one does not read what the other adds
                total = total + outputs[attention].reshape(answer.shape)
                silent = self.weights.with_parameters(
                    {
                        name: torch.zeros_like(t)
                        for name, t in self.weights.parameters.items()
                        if name.startswith(f"{attention}.")
                    }
                )
                self.check_same(self.seen(silent)[1][mlp], outputs[mlp], what)
            elif torch.equal(inputs[first], inputs[second]):
                total = total + outputs[attention].reshape(answer.shape)
            self.check_same(total, answer, what)
        stream = family.residual(config)
        if isinstance(stream, ResidualStream):
            n = answer.shape[-1]
            matrix = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
            turned = self.weights.with_parameters(rotate(self.weights.parameters, stream, self.layout, matrix))
            what = "the stream between its blocks cannot be rotated"
            self.check_same(self.answer(turned, self.stream.hidden.data @ matrix), answer @ matrix, what)
