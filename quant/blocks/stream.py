"""The block stream: hidden states of calibration or evaluation tokens, carried from block to block.

It owns the device and the activations. Inputs of the blocks are captured from the model's own call, arguments
and all, so no family code rebuilds masks or position embeddings. A block runs as a function of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.load import LazyModel, Weights
from quant.blocks.causal import CausalTiles
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.kept import KeptOutputs
from quant.blocks.linears import LinearRef, ModuleCall, See
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.clock import Clock
from quant.core.errors import InputError, foreign
from quant.core.files import reserve, temporary_name
from quant.core.finite import finite_everywhere

EVERYWHERE = slice(None)
WORK = ("forward", "observe")
STORE = "activations"  # name of the file of hidden states on the disk


class _Captured(BaseException):  # noqa: N818  (control flow, not an error)
    """Raised by the last recorder: everything the blocks need has been seen."""


class _Observed(BaseException):  # noqa: N818
    """Raised once every observed linear has seen its input, which it may hold."""

    def __init__(self, seen: Tensor | None = None) -> None:
        super().__init__()
        self.seen = seen


class _StandIn(nn.Module):
    """Takes a block's place; unknown attributes (``attention_type``, ...) are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its meta parameters must stay out of sight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)


class _Recorder(_StandIn):
    """Keeps the arguments that the model gives to a block and passes the hidden states on."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__(block)
        self.last = last
        self.seen: tuple[Tensor, tuple, dict[str, Any]] | None = None

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> tuple:
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        self.seen = (hidden, args, kwargs)
        if self.last:
            raise _Captured
        return (hidden, None)


class _Replay(_StandIn):
    """Answers with given hidden states, in the form that the family's blocks answer."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__(block)
        self.as_tuple = as_tuple
        self.hidden: Tensor | None = None

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return (self.hidden, None) if self.as_tuple else self.hidden


class Activations:
    """Hidden states [n, T, d] of all samples, on the device, in host memory, or in a file on disk."""

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        directory: Path,
    ) -> None:
        self.device, self._pinned = device, False
        if kind == "disk" and shape[0]:
            directory.mkdir(parents=True, exist_ok=True)
            size = shape[0] * shape[1] * shape[2]
            file = temporary_name(directory / STORE)
            reserve(file, size * dtype.itemsize)
            flat = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
            file.unlink()  # the mapping keeps the space until it is dropped; nothing is left behind after a kill
            self._data = flat.view(shape)
        else:
            self._pinned = kind == "cpu" and device.type == "cuda"
            place = device if kind == "device" else "cpu"
            self._data = torch.empty(shape, dtype=dtype, device=place, pin_memory=self._pinned)

    @property
    def data(self) -> Tensor:
        """All of them, where they are kept; waits for copies between the host and the device that are on their way."""
        if self._pinned:
            torch.cuda.synchronize(self.device)
        return self._data

    def __getitem__(self, rows: slice) -> Tensor:
        return self._data[rows].to(self.device, non_blocking=True)

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        # Into pinned memory the host does not wait: who reads it next by `__getitem__` stands behind it in the device's queue.
        self._data[rows].copy_(value, non_blocking=self._pinned)


def own_windows(n: int, batch: int) -> slice:
    """This process's part of n windows: whole batches, so that every window is computed beside the same ones as on one
    process; single windows where there are fewer batches than processes."""
    unit = batch if -(-n // batch) >= ranks.size() else 1
    units = -(-n // unit)
    first, last = (units * place // ranks.size() for place in (ranks.rank(), ranks.rank() + 1))
    return slice(first * unit, min(last * unit, n))


def own_of_batches(n: int, batch: int) -> Tensor:
    """This process's windows of n, int64: its part of every batch, so that all processes together take the steps that one
    takes. The number of processes divides batch, which divides n."""
    windows = torch.arange(n).view(-1, ranks.size(), batch // ranks.size())  # [batches, processes, windows]
    return windows[:, ranks.rank()].flatten()


class BlockStream:
    """Hidden states of tokens [n, T] in front of one block at a time.

    clock: time spent in ``forward`` (blocks) and ``observe`` (observers' own work). heldout: a stream of other windows,
    at the same place, which goes where this one goes; None where there is none. kept: outputs of the block that the stream is
    in front of, for its next passes; dropped when it goes on.
    """

    def __init__(
        self,
        model: LazyModel,
        tokens: Tensor,
        *,
        device: torch.device,
        batch: int,
        store: str = "cpu",
        directory: Path = Path(),
    ) -> None:
        self.model, self.device, self.batch = model, device, batch
        self.tokens = tokens
        self._kept = (store, directory)
        self.hidden: Activations
        self.arguments: list[list[tuple[tuple, dict[str, Any]]]] = []  # per batch, per block
        self.as_tuple = False
        self.clock = Clock(device, WORK)
        self.heldout: BlockStream | None = None
        self.kept: KeptOutputs | None = None

    @property
    def rows(self) -> list[slice]:
        """Samples of each batch."""
        n = self.tokens.shape[0]
        return [slice(i, min(i + self.batch, n)) for i in range(0, n, self.batch)]

    def new_store(self, width: int | None = None, dtype: torch.dtype | None = None) -> Activations:
        """Room for as many numbers of every token, kept where the hidden states are. width, dtype: where they are not those
        of hidden states."""
        kind, directory = self._kept
        shape = (self.tokens.shape[0], self.tokens.shape[1], width or self.model.config.hidden_size)
        return Activations(kind, shape, dtype or self.model.dtype, self.device, directory)

    @torch.no_grad()  # not inference_mode: training keeps the arguments for its backward pass
    def capture(self, outside: Weights) -> BlockStream:
        """Run embeddings only: store what enters the first block and the arguments of every block."""
        self.hidden = self.new_store()
        for rows in self.rows:
            self.hidden[rows] = self._record(rows, outside)
        return self

    def _record(self, rows: slice, outside: Weights) -> Tensor:
        """Keep the arguments that every block gets for these samples; return what enters the first block."""
        blocks = list(self.model.blocks)
        recorders = [_Recorder(block, block is blocks[-1]) for block in blocks]
        with self.model.replaced_blocks(list(recorders)):
            try:
                ids = self.tokens[rows].to(self.device)
                self._call_outside(outside, ids)
            except _Captured:
                pass
        seen = [recorder.seen for recorder in recorders]
        assert all(seen)
        arguments = [(args, kwargs) for _, args, kwargs in seen]  # type: ignore[misc]
        # Unpadded windows of one length share masks and positions: keep one copy.
        same = bool(self.arguments) and _equal(arguments, self.arguments[0])
        self.arguments.append(self.arguments[0] if same else arguments)
        first: Tensor = seen[0][0]  # type: ignore[index]
        return first

    def attach(self, heldout: BlockStream) -> None:
        """Take other windows along; their time counts as this stream's."""
        self.heldout, heldout.clock = heldout, self.clock

    @torch.no_grad()
    def in_batches_of(self, batch: int, outside: Weights) -> BlockStream:
        """The same hidden states (shared, not copied), passing a block ``batch`` samples at a time; held-out windows stay
        behind."""
        other = self._copy()
        other.batch, other.arguments = batch, []
        for rows in other.rows:
            other._record(rows, outside)
        return other

    def fork(self) -> BlockStream:
        """A second stream over the same tokens, at the same place, with its own hidden states; held-out windows stay behind."""
        other = self._copy()
        other.hidden = self.new_store()
        other.hidden.data.copy_(self.hidden.data)
        other.clock = Clock(self.device, WORK)
        return other

    def _copy(self) -> BlockStream:
        other = object.__new__(BlockStream)
        other.__dict__.update(self.__dict__)
        other.heldout = other.kept = None
        return other

    def call(
        self,
        index: int,
        weights: Weights,
        rows: slice,
        arguments: list[tuple[tuple, dict[str, Any]]],
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Outputs of block ``index`` with these weights (its own parameters and buffers) for the samples of a batch. hidden:
        what enters the block, where it is not what the stream holds."""
        args, kwargs = arguments[index]
        with foreign(
            f"block {index} does not run: {self.model.checkpoint.path / 'config.json'} describes it otherwise"
        ):
            entering = self.hidden[rows] if hidden is None else hidden
            output = functional_call(self.model.blocks[index], weights, (entering, *args), kwargs)
        self.as_tuple = isinstance(output, tuple)
        leaving: Tensor = output[0] if self.as_tuple else output
        return leaving

    @torch.inference_mode()
    def run(
        self,
        index: int,
        weights: BlockWeights,
        *,
        observe: Mapping[Any, See] | None = None,
        advance: bool = False,
        act: ActSpec | None = None,
        only: int | None = None,
    ) -> None:
        """Run block ``index`` on every batch. only: on the batch of this number alone, which cannot advance.

        observe: for linears of the block, by name or reference, what to do with their inputs, and for `ModuleCall` with all
        arguments; without ``advance`` a batch
        stops as soon as all have seen theirs. advance: the outputs become the next block's inputs, here and of held-out windows,
        which observers do not see. act: how
        activations are quantized; observers see them quantized.
        Raises InputError where an output is not finite.
        """
        observed = {LinearRef.of_module(k) if isinstance(k, str) else k: see for k, see in (observe or {}).items()}
        block, waiting = self.model.blocks[index], set(observed)
        current, finite = 0, list[Tensor]()
        with ExitStack() as stack:
            stack.enter_context(self.clock.spent("forward"))
            stack.enter_context(CausalTiles())
            own = stack.enter_context(instrument(block, weights, act))
            if self.kept is not None:
                places = [linear.name for linear in observed]
                stack.enter_context(self.kept.on(block, own, act, lambda: current, places, advance))
            for linear, see in observed.items():
                stack.enter_context(linear.observe(block, own, self._observer(linear, see, waiting, not advance)))
            for number, (rows, arguments) in enumerate(zip(self.rows, self.arguments, strict=True)):
                if only not in (None, number):
                    continue
                waiting.update(observed)
                current = number
                try:
                    output = self.call(index, own, rows, arguments)
                except _Observed:
                    continue
                if advance:
                    finite.append(finite_everywhere(output))
                    self.hidden[rows] = output
            self._check(index, finite)
        if advance:
            self.kept = None
        if advance and self.heldout is not None:
            self.heldout.run(index, weights, advance=True, act=act)

    def _check(self, index: int, finite: Sequence[Tensor]) -> None:
        """Raise InputError unless the outputs of all batches are finite, which the device says of all of them at once."""
        if finite and not bool(torch.stack(list(finite)).all()):
            raise InputError(
                f"block {index} gives NaN or infinite activations in {self.model.dtype}; "
                "use --dtype float32 or bfloat16, or check the checkpoint"
            )

    def _observer(self, linear: LinearRef | ModuleCall, act: See, waiting: set[Any], stop: bool) -> See:
        def see(x: Any) -> None:
            with self.clock.spent("observe", within="forward"):
                act(x)
            waiting.discard(linear)
            if stop and not waiting:
                raise _Observed

        return see

    @torch.inference_mode()
    def logits(self, rows: slice, outside: Weights, positions: slice = EVERYWHERE) -> Tensor:
        """Logits float32 [batch, positions, vocabulary] of samples that have passed every block. positions: of their tokens,
        where it is not all of them: what is behind the blocks sees every token alone."""
        return self.head(self.hidden[rows][:, positions], rows, outside, positions).float()

    def head(self, hidden: Tensor, rows: slice, outside: Weights, positions: slice = EVERYWHERE) -> Tensor:
        """Logits [batch, T, vocabulary] of some samples as a function of what leaves the last block, in the arithmetic's
        dtype. positions: of the tokens, that hidden is of."""
        replay = _Replay(self.model.blocks[-1], self.as_tuple)
        replay.hidden = hidden
        with self.model.replaced_blocks([replay]):
            logits: Tensor = self._call_outside(outside, self.tokens[rows, positions].to(self.device)).logits
        return logits

    @torch.inference_mode()
    def head_inputs(self, head: str, rows: slice, outside: Weights) -> Tensor:
        """What the head reads, [batch, T, hidden], of samples that have passed every block; no logits are computed."""

        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            raise _Observed(args[0])

        handle = self.model.module.get_submodule(head).register_forward_pre_hook(see)
        try:
            self.head(self.hidden[rows], rows, outside)
        except _Observed as observed:
            assert observed.seen is not None
            return observed.seen
        finally:
            handle.remove()
        raise RuntimeError(f"the model has no call of {head}, which is its head")

    def _call_outside(self, outside: Weights, ids: Tensor) -> Any:
        """The whole model's answer, with something else where its blocks are."""
        with foreign(f"{self.model.checkpoint.path / 'config.json'} describes a model that does not run"):
            return functional_call(self.model.module, outside, (ids,), {"use_cache": False})


def _equal(a: Any, b: Any) -> bool:
    """Whether two captured arguments hold the same values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, type(a)) and len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    return bool(a == b)
