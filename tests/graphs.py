"""A stand-in for CUDA graphs on a CPU: what is captured leaves no trace but places, and a replay fills these places again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant.core.recording import storage_of, tensors_in
from quant.kernels.steps import graph as graphs

MAIN = "main"


class Capturing(TorchDispatchMode):
    """Keeps operations and their results' places; a torch without a GPU has to carry them out for that, which `end` undoes."""

    def __init__(self, fails_at: int | None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.fails_at = fails_at

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if len(self.calls) == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nsome advice")
        made = {storage_of(t) for call in self.calls for t in tensors_in(call[3])}
        if func._schema.is_mutable and storage_of(args[0]) not in made:
            self.before.setdefault(storage_of(args[0]), (args[0], args[0].clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def end(self) -> None:
        for _, args, kwargs, result in self.calls:
            for tensor in tensors_in(result):
                inputs = {storage_of(t) for t in tensors_in((args, kwargs))}
                if storage_of(tensor) not in inputs and tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # nothing was computed
        for tensor, kept in self.before.values():
            tensor.copy_(kept)


class Stand:
    """Torch's functions for streams and graphs; says what happened. fails_at: the operation that cannot be captured.
    off: what every replay adds to its answer."""

    def __init__(self, patch: pytest.MonkeyPatch, fails_at: int | None = None, off: float = 0.0) -> None:
        self.stream, self.happened, self.fails_at, self.off = MAIN, list[str](), fails_at, off
        self.undone = 0  # memory that captures wrote to
        self.device: torch.device | None = None  # the current one, once it was set
        stand = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.name = f"beside on {device}"

            def wait_stream(self, other: Any) -> None:
                stand.happened.append("wait")

        class CUDAGraph:
            calls: list[tuple[Any, tuple, dict, Any]]

            def replay(self) -> None:
                assert stand.stream == MAIN
                stand.happened.append("replay")
                for func, args, kwargs, result in self.calls:
                    made = tensors_in(func(*args, **kwargs))
                    for place, tensor in zip(tensors_in(result), made, strict=True):
                        if storage_of(tensor) != storage_of(place):
                            place.copy_(tensor)
                tensors_in(self.calls[-1][3])[0].add_(stand.off)

        class Graph:  # of torch.cuda.graph: where its end fails, the stream stays the capture's
            def __init__(self, cuda_graph: CUDAGraph, stream: Stream) -> None:
                self.graph, self.mode = cuda_graph, Capturing(stand.fails_at)
                assert stand.stream == stream.name, "warmed up on the stream of the capture"
                assert stand.device is not None, "kernels of Triton start on the current device"

            def __enter__(self) -> None:
                stand.happened.append("capture")
                self.outside, stand.stream = stand.stream, "capturing"
                self.mode.__enter__()

            def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
                self.mode.__exit__(kind, value, trace)
                self.mode.end()
                stand.undone += len(self.mode.before)
                if value is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                self.graph.calls, stand.stream = self.mode.calls, self.outside

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, stand.stream = stand.stream, stream.name
            try:
                yield
            finally:
                stand.stream = before

        @contextmanager
        def device(which: torch.device) -> Iterator[None]:
            stand.device = which
            yield
            stand.device = None

        patch.setattr(graphs, "DEVICE", "cpu")
        for name, fake in {"Stream": Stream, "CUDAGraph": CUDAGraph, "graph": Graph, "stream": on, "device": device,
                           "current_stream": Stream}.items():  # fmt: skip
            patch.setattr(torch.cuda, name, fake)
