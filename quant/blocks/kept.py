"""Outputs of linears that later passes of the same block need again.

With --true-sequential a block runs once for every step, and each run computes what the runs before it have computed: the
products of the linears that are solved already. Here their outputs are kept, as long as there is room, so that every linear is
multiplied once. What is between them (norms, attention, activations) is computed again. A kept output is the very tensor that
would be computed: its linear, and all in front of it, are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.blocks.fake_quant import ActSpec
from quant.core import env

SHARE = 1 / 8  # of the memory that is free when a block begins


class Room:
    """Bytes that may still be kept, of all streams of a block together."""

    def __init__(self, device: torch.device) -> None:
        self.left = int(SHARE * env.free_bytes(device))

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes; they are taken then."""
        if size > self.left:
            return False
        self.left -= size
        return True


class KeptOutputs:
    """The outputs of one block's linears on the batches of one stream. linears: all of the block, by their names in it; final:
    those that no later pass changes, nor anything in front of them."""

    def __init__(self, room: Room, linears: Collection[str], final: Collection[str] = ()) -> None:
        self._room, self._linears, self.final = room, frozenset(linears), set(final)
        self._outputs: dict[tuple[str, int], Tensor] = {}
        self._tensors: dict[str, Tensor] = {}  # that what is kept was computed with
        self._act: ActSpec | None = None

    @contextmanager
    def on(
        self, block: nn.Module, weights: Mapping[str, Tensor], act: ActSpec | None, batch: Callable[[], int]
    ) -> Iterator[None]:
        """For the length of a `with`, final linears of the block answer with what they answered before on the batch of the
        same number, and keep what they compute. weights: those that the block runs with; where any but those of linears that are
        not final is another tensor than before, or activations are quantized in another way, nothing is known any more."""
        changing = self._linears - self.final
        fixed = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in changing}
        same = act == self._act and all(fixed.get(name) is tensor for name, tensor in self._tensors.items())
        if not same:
            self._outputs.clear()
        self._tensors, self._act = fixed, act
        modules = [(name, module) for name, module in block.named_modules() if name in self.final]
        for name, module in modules:
            module.forward = self._answering(name, module, batch)  # hooks of the module stay in front of it
        try:
            yield
        finally:
            for _, module in modules:
                del module.__dict__["forward"]

    def _answering(self, name: str, module: nn.Module, batch: Callable[[], int]) -> Callable[[Tensor], Tensor]:
        compute: Callable[[Tensor], Tensor] = module.forward

        def forward(x: Tensor) -> Tensor:
            key = (name, batch())
            if key in self._outputs:
                return self._outputs[key].clone()  # a family may add to it in place
            output = compute(x)
            if self._room.take(output.nbytes):
                self._outputs[key] = output.clone()
            return output

        return forward
