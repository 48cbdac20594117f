"""A linear of a block as a reference: where its weight is, how another takes its place, and what goes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.load import Weights

See = Callable[[Any], None]  # what to do with inputs [..., in] of a linear, or with all arguments of a module


@dataclass(frozen=True)
class LinearRef:
    """name: in journals and files. parameter: of the block, which holds the weight [out, in]; with ``index``, the weights
    [experts, out, in] of all experts of a mixture, of which this is one."""

    name: str
    parameter: str
    index: int | None = None

    @classmethod
    def of_module(cls, name: str) -> LinearRef:
        """A linear that is a module of its own."""
        return cls(name, f"{name}.weight")

    def weight(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Its weight [out, in] among those of the block; a view."""
        whole = weights[self.parameter]
        return whole if self.index is None else whole[self.index]

    def replace(self, weights: Weights, weight: Tensor) -> Weights:
        """The block's weights with another [out, in] in this one's place; no tensor is changed."""
        if self.index is not None:
            place = torch.tensor([self.index], device=weight.device)
            weight = weights[self.parameter].index_copy(0, place, weight[None])
        return {**weights, self.parameter: weight}

    @contextmanager
    def observe(self, block: nn.Module, weights: Mapping[str, Tensor], see: See) -> Iterator[None]:
        """For the length of a `with`, give the inputs of every call to ``see``. weights: those that the block runs with."""
        if self.index is None:
            handle = block.get_submodule(self.name).register_forward_pre_hook(lambda module, args: see(args[0]))
            try:
                yield
            finally:
                handle.remove()
        else:
            with _Products(self.weight(weights), see):
                yield


@dataclass(frozen=True)
class ModuleCall:
    """A module of a block whose calls are seen with all their arguments."""

    name: str

    @contextmanager
    def observe(self, block: nn.Module, weights: Mapping[str, Tensor], see: See) -> Iterator[None]:
        """For the length of a `with`, give the arguments of every call to ``see``, as a tuple."""
        handle = block.get_submodule(self.name).register_forward_pre_hook(lambda module, args: see(args))
        try:
            yield
        finally:
            handle.remove()


class _Products(TorchFunctionMode):
    """Sees the products with one weight that is no module's: calls of `F.linear` with this very memory."""

    def __init__(self, weight: Tensor, see: See) -> None:
        super().__init__()
        self.weight, self.see = weight, see

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Everything passes."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = (*args, *(kwargs[name] for name in ("input", "weight")[len(args) :]))[:2]
            if weight.data_ptr() == self.weight.data_ptr() and weight.shape == self.weight.shape:
                self.see(x)
        return func(*args, **kwargs)
