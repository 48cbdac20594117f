"""Consecutive blocks as a function of what is tuned in them: hidden states in, hidden states out, gradients pass.

One chain is a block, a window of blocks or the whole model. Where it recomputes, a block keeps its input alone for the
backward pass and goes through its forward pass again there, its weights made of codes and scales again with it (gradient
checkpointing: Chen et al. 2016, arXiv 1604.06174): the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.tune.codes import Parameters


class Link(Protocol):
    """A block as a function of what is trained of it."""

    def own(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """The parameters of this block among those of all, by ``<index>.<name>``."""
        ...

    def weights_at(self, parameters: Mapping[str, Tensor]) -> BlockWeights:
        """The weights that are deployed with its own parameters, in the arithmetic's dtype; gradients pass."""
        ...

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy of its own parameters that is deployed alike."""
        ...


class Chain:
    """Blocks of a model in their order. training: batches of a step with what every block is given besides hidden states;
    links: what is trained of a block, or the weights of one that stays, by its index; act: of activations."""

    def __init__(
        self,
        training: BlockStream,
        links: Mapping[int, Link | BlockWeights],
        act: ActSpec,
        recompute: bool = False,
    ) -> None:
        self.training, self.links, self.act, self.recompute = training, links, act, recompute

    def settled(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """A copy of all blocks' parameters, as small as it can be: see `TunedBlock.settled`."""
        trained = [(index, link) for index, link in self.links.items() if not isinstance(link, BlockWeights)]
        return {
            f"{index}.{name}": tensor
            for index, link in trained
            for name, tensor in link.settled(link.own(parameters)).items()
        }

    def __call__(self, parameters: Mapping[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
        """Hidden states [batch, T, d] behind the last block. parameters: of all tuned blocks, by ``<index>.<name>``."""
        again = self.recompute and torch.is_grad_enabled()
        for index, link in self.links.items():
            own = {} if isinstance(link, BlockWeights) else link.own(parameters)
            if again:
                with set_checkpoint_early_stop(
                    False
                ):  # it stops a block by an exception, which is no mistake of a file
                    hidden = checkpoint(
                        self._through, index, own, hidden, batch, use_reentrant=False, preserve_rng_state=False
                    )
            else:
                hidden = self._through(index, own, hidden, batch)
        return hidden

    def _through(self, index: int, own: Mapping[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
        link, stream = self.links[index], self.training
        weights = link if isinstance(link, BlockWeights) else link.weights_at(own)
        with instrument(stream.model.blocks[index], weights, self.act) as parameters:
            return stream.call(index, parameters, stream.rows[batch], stream.arguments[batch], hidden)
