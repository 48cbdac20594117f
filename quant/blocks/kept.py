"""Outputs of linears, and of modules around them, that later passes of the same block need again.

With --true-sequential a block runs once for every step, and each run computes what the runs before it have computed: the
products of the linears that are solved already. Here their outputs are kept, as long as there is room, so that every linear is
multiplied once; where all linears of a module are solved (an attention), what the module gives is kept in their place, and
nothing inside it is computed again. A kept output is the very tensor that would be computed: its linears, and all in front of
them, are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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

    def give_back(self, size: int) -> None:
        """So many bytes are no longer kept."""
        self.left += size


class KeptOutputs:
    """The outputs of one block's linears, and modules of them, on the batches of one stream. linears: all of the block, by their
    names in it; final: those that no later pass changes, nor anything in front of them."""

    def __init__(self, room: Room, linears: Collection[str], final: Collection[str] = ()) -> None:
        self._room, self._linears, self.final = room, frozenset(linears), set(final)
        self._outputs: dict[tuple[str, int], Any] = {}
        self._apart: set[tuple[str, int]] = (
            set()
        )  # modules that there was no room for: what is inside is kept, if anything
        self._inside = 0  # modules that are being computed as a whole
        self._tensors: dict[str, Tensor] = {}  # that what is kept was computed with
        self._act: ActSpec | None = None

    @contextmanager
    def on(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        act: ActSpec | None,
        batch: Callable[[], int],
        observed: Collection[str] = (),
        last: bool = False,
    ) -> Iterator[None]:
        """For the length of a `with`, final linears of the block, and modules of final linears alone, answer with what they
        answered before on the batch of the same number, and keep what they compute. weights: those that the block runs with;
        where any but those of linears that are not final is another tensor than before, or activations are quantized in another
        way, nothing is known any more. observed: modules whose inputs are looked at, so that what is around them runs. last: no
        pass follows, and nothing more is kept."""
        changing = self._linears - self.final
        fixed = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in changing}
        same = act == self._act and all(fixed.get(name) is tensor for name, tensor in self._tensors.items())
        if not same:
            self._outputs.clear()
        self._tensors, self._act = fixed, act
        modules = [(name, module) for name, module in block.named_modules() if name and self._is_final(name, observed)]
        for name, module in modules:
            module.forward = self._answering(name, module, batch, not last)  # hooks of the module stay in front of it
        try:
            yield
        finally:
            for _, module in modules:
                del module.__dict__["forward"]

    def _is_final(self, module: str, observed: Collection[str]) -> bool:
        """Whether a module gives the same in all later passes, and nothing has to be seen inside it."""
        own = self._within(module)
        return bool(own) and own <= self.final and not any(name.startswith(f"{module}.") for name in observed)

    def _within(self, module: str) -> set[str]:
        return {name for name in self._linears if name == module or name.startswith(f"{module}.")}

    def _answering(self, name: str, module: nn.Module, batch: Callable[[], int], keeps: bool) -> Callable[..., Any]:
        compute: Callable[..., Any] = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, batch())
            if key in self._outputs:
                return _copied(self._outputs[key])  # a family may add to it in place
            if key in self._apart:
                return compute(*args, **kwargs)
            self._inside += 1
            try:
                output = compute(*args, **kwargs)
            finally:
                self._inside -= 1
            if keeps and not self._inside:
                self._keep(name, key[1], output)
            return output

        return forward

    def _keep(self, name: str, batch: int, output: Any) -> None:
        """Keep what a module gives on a batch in the place of what is kept inside it, if there is room."""
        tensors = _tensors(output)
        if tensors is None or not self._room.take(sum(tensor.nbytes for tensor in tensors)):
            if name not in self._linears:
                self._apart.add((name, batch))
            return
        for inner in self._within(name):
            replaced = self._outputs.pop((inner, batch), None)
            self._room.give_back(sum(tensor.nbytes for tensor in _tensors(replaced) or ()))
        self._outputs[name, batch] = _copied(output)


def _tensors(output: Any) -> list[Tensor] | None:
    """The tensors that a module gave, alone or in a tuple with what is None; None where it gave something else."""
    parts = output if isinstance(output, tuple) else (output,)
    given = [part for part in parts if part is not None]
    return given if all(isinstance(part, Tensor) for part in given) else None


def _copied(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if part is None else part.clone() for part in output)
    return output.clone()
