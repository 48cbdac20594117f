"""Seconds of work by name. On CUDA the host is ahead of the device: marks are laid between the work, and only who asks for the
seconds waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

MOST_MARKS = 4096  # pairs that are kept unread


class Clock:
    """Seconds under some names, of work on one device."""

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self.device = device
        self._seconds = dict.fromkeys(names, 0.0)
        self._unread: list[tuple[str, str | None, Any, Any]] = []

    @contextmanager
    def spent(self, name: str, within: str | None = None) -> Iterator[None]:
        """Count what is done in a `with` under a name, unless it fails. within: the name that counts the same time too, from which
        it is taken."""
        started = self._mark()
        yield
        self._unread.append((name, within, started, self._mark()))
        if len(self._unread) >= MOST_MARKS or self.device.type != "cuda":
            self._read()

    @property
    def seconds(self) -> dict[str, float]:
        """Those until now, by name; waits for the device."""
        self._read()
        return dict(self._seconds)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        if unread and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name, within, started, ended in unread:
            passed = ended - started if isinstance(started, float) else started.elapsed_time(ended) / 1e3
            self._seconds[name] += passed
            if within is not None:
                self._seconds[within] -= passed
