"""A recorded step as a program of compiled loops: its small operations follow each other without Python.

Every tensor of the recording keeps its place in memory, and the program fills them again in the same order. What there are no
loops for stays torch's. The first step is taken by torch, operation by operation, and the loops of each are tried beside it on the very same
inputs: one that gives something else stays torch's, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.core.recording import Call, Recording, storage_of, tensors_in, written_by
from quant.kernels.steps import loops
from quant.kernels.steps.operations import Rows, rows_of
from quant.kernels.threads import share_threads

TOLERANCE = 1e-5  # of the largest number of a result: what sums in another order may be apart


@dataclass
class _Operation:
    """rows: of compiled loops; None: torch's own."""

    call: Call
    rows: Rows | None

    def by_torch(self) -> None:
        """Fill the results as the recording did."""
        made = self.call.function(*self.call.args, **self.call.kwargs)
        if not self.call.writes:
            for place, tensor in zip(tensors_in(self.call.result), tensors_in(made), strict=True):
                place.copy_(tensor)

    def checked(self) -> None:
        """Fill the results by torch; give up the loops where they fill them with something else."""
        if self.rows is None:
            self.by_torch()
            return
        filled = tensors_in(written_by(self.call) if self.call.writes else self.call.result)
        before = [tensor.clone() for tensor in filled]
        right = int(loops.run(np.array(self.rows.rows, np.uint64))) < 0
        own = [tensor.clone() for tensor in filled]
        for tensor, kept in zip(filled, before, strict=True):
            tensor.copy_(kept)
        self.by_torch()
        if not right or not all(map(_is_near, own, filled)):
            self.rows = None


@dataclass
class Program:
    """What a recording does, for other inputs of its shape: filled by `checked` once, then called."""

    recording: Recording
    operations: list[_Operation]
    parts: list[Any] = field(default_factory=list)  # programs of rows, and operations of torch

    @classmethod
    def of(cls, recording: Recording) -> Program | None:
        """None where the recording is not of float32 on a CPU, or nothing of it has compiled loops."""
        if recording.given.device.type != "cpu" or recording.result.dtype != torch.float32:
            return None  # rounded to fewer digits in between, sums in another order would show
        operations = [_Operation(call, rows_of(call)) for call in recording.varying() if not _is_view(call)]
        return cls(recording, operations) if any(own.rows for own in operations) else None

    def checked(self, given: Tensor) -> Tensor:
        """The result for an input, to the last bit torch's, while the loops of every operation are tried on the same numbers."""
        share_threads()
        self.recording.given.copy_(given)
        for operation in self.operations:
            operation.checked()
        self.parts = []
        for compiled, own in groupby(self.operations, lambda operation: operation.rows is not None):
            if compiled:
                rows = [row for operation in own if operation.rows is not None for row in operation.rows.rows]
                self.parts.append(np.array(rows, np.uint64))
            else:
                self.parts += own
        return self.recording.result.clone()

    def __call__(self, given: Tensor) -> Tensor:
        """The result for another input. Raises IndexError where the step writes behind the end of its memory."""
        share_threads()
        self.recording.given.copy_(given)
        for part in self.parts:
            if isinstance(part, _Operation):
                part.by_torch()
            elif loops.run(part) >= 0:
                raise IndexError("a recorded step writes to a place that its memory does not have")
        return self.recording.result.clone()


def _is_view(call: Call) -> bool:
    """Whether an operation gives its arguments' memory in another form: that is where it was."""
    if call.writes or not isinstance(call.function, torch._ops.OpOverload):
        return False
    read = {storage_of(t) for t in tensors_in((call.args, call.kwargs))}
    return all(storage_of(t) in read for t in tensors_in(call.result))


def _is_near(own: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same but for rounding; what is not finite never is."""
    if not own.is_floating_point() or not own.numel():
        return torch.equal(own, other)
    apart, most = float((own - other).abs().max()), float(other.abs().max())
    return apart <= TOLERANCE * most
