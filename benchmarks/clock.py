"""Every second of a process in exactly one part, and the work that was done in it, which becomes seconds at measured rates.

A part begins inside another one and takes the clock from it: a linear's product inside a block's pass counts as the product
alone. Nothing of what is measured knows of this: functions are wrapped from outside, for the length of a `with`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import synchronize

REST = "rest"
COPIED = 1 << 26  # bytes, beyond what caches hold
COLUMNS = 128  # of a solver's blocks
REPEATS, BUDGET = 3, 0.1  # runs, and seconds, that a rate is taken from

Place = tuple[str, str]  # stage, part


class Work(NamedTuple):
    """Something of which the seconds are measured by itself, by kind and sizes:

    copy: a byte read or written. linear (tokens, out, in): a product with a weight. product (m, k, n). gram (tokens, in): XᵀX.
    sweep (out, in): the products of a solver that passes over all columns, in blocks of COLUMNS, each with the whole matrix
    behind it. cholesky (in).
    """

    kind: str
    sizes: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def flops(self) -> float:
        """Floating-point operations; 0 for copies."""
        size = self.sizes
        return {
            "copy": lambda: 0.0, "linear": lambda: 2.0 * size[0] * size[1] * size[2],
            "product": lambda: 2.0 * size[0] * size[1] * size[2], "gram": lambda: 2.0 * size[0] * size[1] ** 2,
            "sweep": lambda: 2.0 * size[0] * size[1] ** 2, "cholesky": lambda: size[0] ** 3 / 3,
        }[self.kind]()  # fmt: skip

    def example(self, device: torch.device) -> Callable[[], Any]:
        """The same work on tensors of its own."""

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(self.dtype)

        size = self.sizes
        if self.kind == "copy":
            large = torch.zeros(COPIED, dtype=torch.uint8, device=device)
            return partial(torch.zeros_like(large).copy_, large)
        if self.kind == "linear":
            return partial(F.linear, random(size[0], size[2]), random(size[1], size[2]))
        if self.kind == "product":
            return partial(torch.mm, random(size[0], size[1]), random(size[1], size[2]))
        if self.kind == "gram":
            x = random(*size)
            return lambda: x.T @ x
        square = random(size[-1], size[-1])
        if self.kind == "cholesky":
            positive = square @ square.T + size[0] * torch.eye(size[0], device=device)
            return partial(torch.linalg.cholesky, positive)
        return partial(_sweep, torch.zeros(size, device=device), random(*size), square)


def _sweep(correlation: Tensor, change: Tensor, gram: Tensor) -> None:
    for start in range(0, gram.shape[0], COLUMNS):
        part = slice(start, start + COLUMNS)
        correlation.addmm_(change[:, part], gram[part])


Done = Iterable[tuple[Work, float]]  # work, how often


class Clock:
    """seconds: of every stage and part, which together are all that passed. work: how often what was done there. calls: how
    often a part began. cpu: count seconds in which this process computes, where others use its cores; on one thread alone."""

    def __init__(self, device: torch.device, cpu: bool = False) -> None:
        self.device, self._now = device, time.process_time if cpu else time.perf_counter
        self.seconds: Counter[Place] = Counter()
        self.calls: Counter[Place] = Counter()
        self.work: dict[Place, Counter[Work]] = {}
        self._open: list[Place] = [("around", REST)]
        self._since = self._now()
        self._rates: dict[Work, float] = {}

    @property
    def part(self) -> str:
        """Where the clock runs now."""
        return self._open[-1][1]

    def stop(self) -> None:
        """Give what has passed to the part that is open."""
        synchronize(self.device)
        now = self._now()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def within(self, part: str, stage: str | None = None) -> Iterator[None]:
        """Time belongs to a part, for the length of a `with`; stage: of this one and of those inside."""
        self.stop()
        place = (stage or self._open[-1][0], part)
        self._open.append(place)
        self.calls[place] += 1
        try:
            yield
        finally:
            self.stop()
            self._open.pop()

    def timed(
        self,
        function: Callable[..., Any],
        part: str,
        work: Callable[..., Done] | None = None,
        stage: str | None = None,
        inside: Iterable[str] = (),
    ) -> Callable[..., Any]:
        """The function as a part. work: what was done, of the answer and the arguments. inside: parts that it is counted with
        where they are open."""
        outer = frozenset(inside)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(self.part if self.part in outer else part, stage):
                answer = function(*args, **kwargs)
                if work is not None:
                    self.add(*work(answer, *args, **kwargs))
            return answer

        return run

    def add(self, *done: tuple[Work, float]) -> None:
        """Work that the open part did."""
        counted = self.work.setdefault(self._open[-1], Counter())
        for work, times in done:
            counted[work] += times  # type: ignore[assignment]

    def rate(self, work: Work) -> float:
        """Seconds of this work, once; the fastest of a few runs, measured when it is first asked for."""
        if work not in self._rates:
            run, times = work.example(self.device), list[float]()
            run()
            while len(times) < REPEATS or sum(times) < BUDGET:
                synchronize(self.device)
                started = self._now()
                run()
                synchronize(self.device)
                times.append(self._now() - started)
            self._rates[work] = min(times) / (2 * COPIED if work.kind == "copy" else 1)
        return self._rates[work]

    def floor(self, place: Place) -> float:
        """Seconds of the work of a part."""
        return sum(times * self.rate(work) for work, times in self.work.get(place, {}).items())

    @cached_property
    def copied(self) -> float:
        """Bytes a second, read and written."""
        return 1 / self.rate(Work("copy"))
