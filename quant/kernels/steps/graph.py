"""A recorded step as one CUDA graph: the GPU repeats its kernels, and Python launches them once instead of a thousand times.

The replay of a recording is captured, which executes nothing. A graph reads and writes the memory that it was captured with: the
input is copied there, the result from there, and what the step writes to (a cache, its place) is where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.core.recording import Call, Recording, tensors_in, written_by

DEVICE = "cuda"  # the kind whose work is captured


@dataclass
class Graph:
    """What a recording does, for other inputs of its shape: captured by `checked`, then called.

    given: where the graph reads its input. replay: the same operation by operation; it also keeps what the graph reads.
    state: what the step writes to. instead: why operations are replayed one by one, where they are.
    """

    given: Tensor
    replay: Callable[[Tensor], Tensor]
    state: list[Tensor]
    instead: str = ""
    graph: torch.cuda.CUDAGraph | None = None
    result: Tensor | None = None  # where the graph leaves it

    @classmethod
    def of(cls, recording: Recording) -> Graph | None:
        """None where the recording is not of CUDA."""
        if recording.given.device.type != DEVICE:
            return None
        varying = recording.varying()
        state = {id(tensor): tensor for call in varying for tensor in _written(call)}
        return cls(recording.given, recording.replay(), list(state.values()), _why_not(varying, recording.given.device))

    def checked(self, given: Tensor) -> Tensor:
        """The result for an input, operation by operation; the same is captured and has to give it to the last bit. However that
        ends, what the step writes to is one step further."""
        if self.instead:
            return self.replay(given)
        device = self.given.device
        try:
            before = [tensor.clone() for tensor in self.state]
        except RuntimeError as error:  # no memory for a second cache
            self.instead = f"a step is not captured: {_first_line(error)}"
            return self.replay(given)
        # Captures are not for the default stream; kernels of Triton start on the current device, whatever tensors they are given.
        here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        beside.wait_stream(here)
        with torch.cuda.device(device), torch.cuda.stream(beside):  # left also where a capture's own end fails
            expected = self.replay(given)  # all kernels are loaded then, and libraries have their memory
            self._capture(beside)
        here.wait_stream(beside)
        if self.graph is None:
            return expected
        # Captured a step later and with the recorded input: what it took from the host would be wrong here.
        self._put_back(before)
        if torch.equal(self(given), expected):
            return expected
        self.graph, self.result, self.instead = None, None, "a captured step gives something else"
        self._put_back(before)
        return self.replay(given)

    def __call__(self, given: Tensor) -> Tensor:
        """The result for another input, the caller's own."""
        if self.graph is None or self.result is None:
            return self.replay(given)
        self.given.copy_(given)
        self.graph.replay()
        return self.result.clone()

    def _capture(self, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.result = self.replay(self.given)
        except RuntimeError as error:  # of CUDA: something waits for the device, or its memory is full
            first = error.__context__ or error  # where an operation fails, so does the end of the capture
            self.result, self.instead = None, f"a step is not captured: {_first_line(first)}"
            return
        self.graph = graph

    def _put_back(self, before: list[Tensor]) -> None:
        for tensor, kept in zip(self.state, before, strict=True):
            tensor.copy_(kept)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _written(call: Call) -> list[Tensor]:
    return tensors_in(written_by(call)) if call.writes else []


def _why_not(varying: list[Call], device: torch.device) -> str:
    """Why a step is not to be captured; nothing where it may be tried. A first answer could be right with either."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms read the places that they write to"
    if any(tensor.device != device for call in varying for tensor in (*tensors_in(call.result), *_written(call))):
        return "a graph repeats nothing of another device"
    return ""
