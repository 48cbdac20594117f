"""What the measurements share: flags, a clock, the words about a machine, Markdown on the terminal and in a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quant.cli.console import console
from quant.core import env
from quant.core.text import markdown_table


def flags(doc: str | None, device: str = "auto") -> argparse.ArgumentParser:
    """A parser with what every measurement is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    return parser


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(
    work: Callable[[], object],
    device: torch.device,
    repeats: int = 3,
    warm_up: bool = False,
    budget: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of the fastest of ``repeats`` runs, and of more until ``budget`` seconds are spent. warm_up: a first run is
    not counted."""
    times: list[float] = []
    while len(times) < repeats + warm_up or sum(times) < budget:
        synchronize(device)
        started = clock()
        work()
        synchronize(device)
        times.append(clock() - started)
    return min(times[warm_up:])


def kernel_seconds(
    work: Callable[[], object], device: torch.device, budget: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of the fastest run after a first one, of four at least and until ``budget`` seconds are spent. On CUDA of the device
    alone, between two events around a graph of what ``work`` launches: the host takes longer to launch a small kernel than it runs."""
    if device.type != "cuda":
        return best_seconds(work, device, warm_up=True, budget=budget, clock=clock)
    run, times = _as_graph(work, device), list[float]()
    while len(times) < 4 or sum(times) < budget:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        run()
        ended.record()
        synchronize(device)
        times.append(started.elapsed_time(ended) / 1e3)
    return min(times[1:])


def _as_graph(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replays what ``work`` launches; where that cannot be kept as a graph, work itself."""
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(2):  # kernels compile and libraries take their memory
            work()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=beside):
            work()
    except RuntimeError:  # something in it asks the device
        return work
    return graph.replay


def peak_of(device: torch.device) -> int:
    """Peak bytes since `env.reset_peak`: of the device, on a CPU of this process."""
    peak = env.peak_bytes(device)
    return peak["device"] or peak["host"]


def version_line(packages: Mapping[str, str]) -> str:
    """The packages of a measurement."""
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def machine_line(hardware: Mapping[str, Any], packages: Mapping[str, str]) -> str:
    """The machine and the packages of a measurement."""
    return f"{dict(hardware)}; {version_line(packages)}"


def about(doc: str | None) -> str:
    """A module's docstring behind its first line and its commands, as one line."""
    return (doc or "").split("\n\n", 2)[2].strip().replace("\n", " ")


def table(records: Iterable[Mapping[str, str]]) -> list[str]:
    """The lines of a whole table, with an empty line behind them."""
    return [*markdown_table(records), ""]


def report(head: Sequence[str], records: Iterable[Mapping[str, str]], out: Path | None) -> list[str]:
    """Print every row of a table as soon as it is measured; write what there is of it, behind ``head``, to a file if one is
    asked for. Returns all lines."""
    lines = list(head)
    for line in markdown_table(records):
        show(line)
        lines.append(line)
        write(lines, out)
    return lines


def show(*lines: str) -> None:
    """Print lines as they are."""
    out = console()
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def write(lines: Sequence[str], out: Path | None) -> None:
    """Write lines to a file, if one is asked for."""
    if out:
        out.write_text("\n".join(lines).rstrip("\n") + "\n")
