"""What computes outside the blocks, with something else than the model's own embedding and head where these are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from models.load import Weights
from quant.blocks.instrument import mount

Deployed = Callable[[Weights], "OutsideWeights"]  # the model's own weights outside -> those that are deployed


@dataclass(frozen=True)
class OutsideWeights:
    """Parameters and buffers outside the blocks by their names in the whole model, and modules, with packed weights, that
    stand in the place of the model's own."""

    weights: Weights
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    @contextmanager
    def mounted(self, model: nn.Module) -> Iterator[Weights]:
        """For the length of a `with`, the modules are in their places; yields the weights of the others."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                mount(stack, model, name, module)
            yield self.weights


def with_modules(weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> OutsideWeights:
    """The weights with modules in the place of others, whose own weights are left out."""
    inside = tuple(f"{name}." for name in modules)
    return OutsideWeights({name: tensor for name, tensor in weights.items() if not name.startswith(inside)}, modules)
