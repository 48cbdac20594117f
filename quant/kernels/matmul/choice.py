"""Up to how many tokens a CPU multiplies packed codes as they lie, and above which it expands rows for the library's product:
measured at the first product that hangs on it, and kept on disk.

Both ways give the same sums but for the order they are added in, so a clock may decide. What was measured is used only once it is
kept: a second run on the same machine takes the same way, to the same bits. Where it cannot be kept, where LLM_QUANTIZER_MEASURE is
0, where only deterministic algorithms are wanted, and where several processes share a job, whose parts must be of one way whatever
machines they are on, layouts take the constants of their source.

No third way rounds rows to bfloat16 for the library's product of bfloat16 inputs: a clock would then decide how weights are rounded.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from quant.core import ranks
from quant.core.errors import InputError
from quant.core.files import check_plain_file, hold_lock, json_sha256, read_json, write_json
from quant.core.names import DEFAULT_CACHE
from quant.kernels.matmul.weight import TILE, Layout, PackedGrid, PackedWeight, pack_small

log = logging.getLogger(__name__)
FOLDER = DEFAULT_CACHE / "products"  # a file a machine
SCHEMA = 1
SWITCH = "LLM_QUANTIZER_MEASURE"  # 0: nothing is measured
# Tokens that may be the most that codes are multiplied as they lie for. Up to the first they always are, above the last never.
CANDIDATES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
TIE = 0.05  # by which the way that the constant does not take must be faster
ROUNDS = (2, 7)  # of both ways in turn: at least, and at most
BUDGET = 0.06  # seconds of rounds, of one number of tokens, after which the least is enough
# Of the weight that is measured, tiles a thread. Expanded, it leaves the caches, as rows of a model do: a smaller one said less.
TILES, COLUMNS, GROUP = 16, 4096, 128
MOST_SHARES = 16  # of rows, of more threads: 33 million codes
CPU_INFO = Path("/proc/cpuinfo")
Way = Callable[[int], object]  # does a product of so many tokens


class TwoWays(Layout, Protocol):
    """A layout of a CPU whose products of float inputs can be taken in both ways, to the same sums."""

    name: str

    def instructions(self) -> str:
        """The level of vectors that its kernels are compiled for."""

    def usual(self, bits: int) -> int:
        """Tokens up to which codes are multiplied as they lie where nothing is measured."""

    def multiplied(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """`matmul` by the codes as they lie."""

    def expanded(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """`matmul` by rows written out for the library."""


_chosen: dict[tuple[Any, ...], tuple[int, bool]] = {}  # tokens, and whether they were measured


def is_multiplied(layout: TwoWays, bits: int, n: int) -> bool:
    """Whether codes of so many bits are multiplied as they lie for n tokens. The first call with a number of tokens that both ways
    are plausible for may take a second."""
    if n <= CANDIDATES[0]:
        return True
    return n <= CANDIDATES[-1] and n <= up_to(layout, bits)


def up_to(layout: TwoWays, bits: int) -> int:
    """The most tokens that codes of so many bits are multiplied as they lie for, measured if need be."""
    fixed = is_fixed()
    key = (layout.name, layout.instructions(), bits, *_threads(), fixed)
    if key not in _chosen:
        measured = None if fixed else _kept_or_measured(layout, bits)
        _chosen[key] = (layout.usual(bits), False) if measured is None else (measured, True)
    return _chosen[key][0]


def is_fixed() -> bool:
    """Whether constants decide, whatever was measured."""
    return os.environ.get(SWITCH) == "0" or torch.are_deterministic_algorithms_enabled() or ranks.size() > 1


def described() -> dict[str, dict[str, Any]]:
    """What this process has chosen, for a manifest: by layout, bits and threads (of the library and of compiled loops), the most
    tokens. Several runs of one process have the same list."""
    return {
        f"{name}, {instructions}, {bits} bits, {threads}/{loops} threads": {
            "multiplied_up_to": most,
            "by": "measurement" if measured else "constant",
        }
        for (name, instructions, bits, threads, loops, _), (most, measured) in _chosen.items()
    }


def machine(instructions: str) -> dict[str, Any]:
    """What a measurement holds for."""
    packages = {name: version(name) for name in ("torch", "numba")}
    return {"cpu": _cpu_name(), "instructions": instructions, "threads": list(_threads()), **packages}


def _threads() -> tuple[int, int]:
    from quant.kernels.threads import thread_counts  # numba, which a run without packed products needs not

    return thread_counts()


def _cpu_name() -> str:
    if CPU_INFO.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if named:
            return named[1]
    return platform.processor() or platform.machine()


def _kept_or_measured(layout: TwoWays, bits: int) -> int | None:
    """The number from the file of this machine, measured and written if it is not there; None where it cannot be kept."""
    entry, usual = f"{layout.name}, {bits} bits", layout.usual(bits)
    if not FOLDER.is_absolute():  # nobody has a home
        return None
    try:
        here = machine(layout.instructions())
        file = FOLDER / f"{json_sha256(here)[:32]}.json"
        if _is_valid(kept := _read(file, here).get(entry), usual):
            return kept
        check_plain_file(file)
        FOLDER.mkdir(parents=True, exist_ok=True)
        _compile(layout, bits)  # which may take a minute on a busy machine: nobody waits for the lock that long
        with hold_lock(file.with_suffix(".lock"), str(file), patience=60):
            others = _read(file, here)  # another process may have measured meanwhile: the first one decides
            if _is_valid(kept := others.get(entry), usual):
                return kept
            most = _measured(layout, bits)
            write_json(file, {"schema": SCHEMA, "machine": here, "multiplied_up_to": others | {entry: most}})
            return most
    except (
        OSError,
        InputError,
        ImportError,
    ) as error:  # the last: a package without a version; a run goes on without it, as it would with constants
        log.info("products with packed weights go by constants, as no measurement can be kept: %s", error)
        return None


def _read(file: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The entries of a machine's file; none where it is not there, damaged or of something else: it is measured again."""
    if not file.exists():
        return {}
    try:
        stored = read_json(file)
    except InputError as error:
        log.info("%s", error)
        return {}
    entries = stored.get("multiplied_up_to")
    same = stored.get("schema") == SCHEMA and stored.get("machine") == here
    return entries if same and isinstance(entries, dict) else {}


def _is_valid(kept: object, usual: int) -> TypeGuard[int]:
    """Whether a measurement can have said so; True is no number."""
    return type(kept) is int and kept in (*CANDIDATES, usual)


def _measured(layout: TwoWays, bits: int) -> int:
    """By products with a weight of a few hundred rows. With one thread, seconds are those of this process alone: other programs do
    not lengthen them."""
    threads = _threads()[0]
    weight = _weight(layout, bits, TILES * min(threads, MOST_SHARES) * TILE)
    inputs = torch.linspace(-1, 1, CANDIDATES[-1] * COLUMNS).view(-1, COLUMNS)
    return crossover(
        lambda n: layout.multiplied(inputs[:n], weight),
        lambda n: layout.expanded(inputs[:n], weight),
        layout.usual(bits),
        time.process_time if threads == 1 else time.perf_counter,
    )


def _compile(layout: TwoWays, bits: int) -> None:
    """Both ways, for a few rows."""
    few, x = _weight(layout, bits, TILE), torch.ones(CANDIDATES[0], COLUMNS)
    layout.multiplied(x, few)
    layout.expanded(x, few)


def _weight(layout: TwoWays, bits: int, rows: int) -> PackedWeight:
    """Any codes, with scales and zero points as most checkpoints have them; the state of random numbers stays as it is."""
    codes = (torch.arange(COLUMNS) * 7 % 2**bits).to(torch.uint8).expand(rows, -1).contiguous()
    groups = torch.ones(COLUMNS // GROUP, rows)
    grid = PackedGrid(groups.half(), pack_small(groups, bits))
    return PackedWeight(layout, bits, rows, COLUMNS, GROUP, layout.pack(codes, bits), grid)


def crossover(multiplied: Way, expanded: Way, usual: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The most tokens of CANDIDATES and ``usual`` that the first way is taken for, by bisection: it is taken for all below, too.
    Where neither is faster by TIE, the way stays that which ``usual`` says. clock: seconds."""
    places = sorted({*CANDIDATES, usual})
    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high + 1) // 2
        n = places[middle]
        first, second = best_of(partial(multiplied, n), partial(expanded, n), clock)
        margin = 1 + TIE if n <= usual else 1 / (1 + TIE)
        if first <= second * margin:
            low = middle
        else:
            high = middle - 1
    return places[low]


def best_of(
    first: Callable[[], object], second: Callable[[], object], clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of the fastest call of either, called in turn, after a call of each that is not counted."""
    first(), second()
    times: list[tuple[float, float]] = []
    started = clock()
    while len(times) < ROUNDS[0] or (len(times) < ROUNDS[1] and clock() - started < BUDGET):
        marks = [clock()]
        for call in (first, second):
            call()
            marks.append(clock())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return min(own for own, _ in times), min(own for _, own in times)
