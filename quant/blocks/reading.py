"""The blocks of a model one after the other: on CUDA a thread reads the next one while this one is worked on.

Only bytes move in the thread, from the files into pinned memory of the host; all that is decided about tensors is decided where
the block is asked for, in the same order as without a thread, and so are errors told. On a CPU each block is read when it is
asked for: the cores that would read ahead are those that solve, and the next block would be in memory beside this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.linears import LinearRef
from quant.blocks.weights import BlockWeights


def _nothing(index: int) -> Collection[str]:
    return ()


class BlockReader:
    """Weights of blocks 0, 1, ... of a model, for the length of a `with`, which ends the reading.

    n_blocks: as many are asked for. without: of a block the linears whose weights are not read. ahead: whether a thread reads the
    next block; where it is not said, on CUDA, unless the checkpoint computes what it reads.
    """

    def __init__(
        self,
        model: LazyModel,
        device: torch.device,
        n_blocks: int,
        without: Callable[[int], Collection[str]] = _nothing,
        ahead: bool | None = None,
    ) -> None:
        self.model, self.device, self.n_blocks, self.without = model, device, n_blocks, without
        self.ahead = device.type == "cuda" and not model.checkpoint.computes if ahead is None else ahead
        self._next: _Reading | None = None

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *failed: object) -> None:
        if self._next is not None:
            self._next.stop()

    def read(self, index: int) -> BlockWeights:
        """The weights of a block. Raises what reading it raised."""
        reading, self._next = self._next, None
        tensors, error = ({}, None) if reading is None else reading.ended(index)
        if self.ahead and index + 1 < self.n_blocks:
            self._next = _Reading(self.model, index + 1, self._keys(index + 1), self.device)

        def read(key: str) -> Tensor:
            if key in tensors:
                return tensors.pop(key)
            if error is not None:  # the first that is missing is the one that could not be read
                raise error
            return self.model.checkpoint.read(key)

        return BlockWeights.read(self.model, index, self.device, without=self.without(index), read=read)

    def _keys(self, index: int) -> list[str]:
        """Found here, not in the thread: the modules are others while embeddings and head are in use."""
        return self.model.block_keys(index, [LinearRef.of_module(linear).parameter for linear in self.without(index)])


class _Reading:
    """A thread that reads some tensors of one block."""

    def __init__(self, model: LazyModel, index: int, keys: Collection[str], device: torch.device) -> None:
        self._index, self._keys, self._read, self._device = index, keys, model.checkpoint.read, device
        self._tensors: dict[str, Tensor] = {}
        self._stopped = threading.Event()
        # Threads begin on the first CUDA device, whatever the others use.
        self._place = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        pool = ThreadPoolExecutor(1, f"block {index}")
        self._work = pool.submit(self._all)
        pool.shutdown(wait=False)

    def ended(self, index: int) -> tuple[dict[str, Tensor], BaseException | None]:
        """What was read, by names in the checkpoint, and what reading on raised; nothing if it is not of that block. Waits."""
        if index != self._index:
            self.stop()
            return {}, None
        return self._tensors, self._work.exception()

    def stop(self) -> None:
        """Read no further; ends when the tensor at hand is there."""
        self._stopped.set()
        wait([self._work])

    def _all(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._place)  # of this thread
        for key in self._keys:
            if self._stopped.is_set():
                return
            self._tensors[key] = self._held(self._read(key))

    def _held(self, tensor: Tensor) -> Tensor:
        """In memory, where a device takes it from without the host's help."""
        return tensor.pin_memory() if self._device.type == "cuda" else tensor
