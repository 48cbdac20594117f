"""Solver time against the floor: the bare matrix products of the same sweeps, in one run, as ratios.

    python -m benchmarks.solvers [--shapes 768x768 2048x2048] [--sweeps 30] [--device cpu] [--out results.md]

Floors: quantease 2·out·in² flops a sweep in blocks of 128 columns; gptq the products of its block updates,
out·in² flops, and one Cholesky factorization; gram the dense product, 2·tokens·in² flops. column loop: the published
formulation restated, one matrix-vector product a column over the whole matrix, timed for two sweeps and scaled. Times
are the best of a few runs; "times the floor" is ours divided by the floor of the same row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quant.core import machine
from quant.core.cli import console
from quant.core.grid import fit_grid
from quant.core.linalg import relative_error
from quant.core.recipe import products_in
from quant.core.stats import LayerStats
from quant.core.types import Grid, QuantSpec
from quant.gptq import gptq
from quant.kernels import blocks
from quant.kernels.blocks import Kernels, TorchKernels, kernels
from quant.quantease import Descent, quantease, rounds

BLOCK = 128
HEADER = "| out x in | what | backend | seconds | floor, seconds | times the floor | column loop / ours | peak MB |"


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Best of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def column_loop(weight: Tensor, gram: Tensor, grid: Grid, rounding: list[bool]) -> Tensor:
    """Coordinate descent a column at a time: u_j from the products of all columns with N_j = Σ_j / Σ_jj."""
    scale, zero = grid.scale[:, 0], grid.zero[:, 0].float()
    normalized = gram / gram.diagonal()
    target = weight @ normalized
    normalized = normalized.fill_diagonal_(0).T.contiguous()  # row j is N_j
    current = weight.clone()
    for rounds_now in rounding:
        for j in range(weight.shape[1]):
            u = target[:, j] - current @ normalized[j]
            if rounds_now:
                u = ((u / scale).round_().add_(zero).clamp_(0, grid.qmax) - zero) * scale
            current[:, j] = u
    return current


def descend(weight: Tensor, gram: Tensor, grid: Grid, rounding: list[bool]) -> Tensor:
    """The same sweeps by the blocked method."""
    descent = Descent(weight, gram, grid, BLOCK)
    for rounds_now in rounding:
        descent.sweep(rounds_now)
    return weight - descent.residual


def sweep_floor(correlation: Tensor, change: Tensor, gram: Tensor) -> None:
    """The matrix products of one coordinate-descent sweep."""
    for start in range(0, gram.shape[0], BLOCK):
        part = slice(start, start + BLOCK)
        correlation.addmm_(change[:, part], gram[part])


def gptq_floor(work: Tensor, gram: Tensor) -> None:
    """The matrix products of GPTQ's block updates, and its factorization."""
    upper = torch.linalg.cholesky(gram)
    for start in range(0, gram.shape[0] - BLOCK, BLOCK):
        end = start + BLOCK
        torch.mm(work[:, start:end], upper[start:end, end:])


def problem(n_out: int, n_in: int, device: str) -> tuple[Tensor, Tensor]:
    """Gaussian weights [out, in] and correlated inputs [2 in, in]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(n_in) + torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    x = torch.randn(2 * n_in, n_in, generator=generator) @ mixing
    return torch.randn(n_out, n_in, generator=generator).to(device), x.to(device)


def measured(n_out: int, n_in: int, device: str, sweeps: int, backends: list[Kernels], precision: str) -> list[str]:
    """The rows of one shape."""
    weight, x = problem(n_out, n_in, device)
    stats, spec = LayerStats(n_in, device), QuantSpec(3)
    stats.update(x)
    gram, work, schedule = stats.gram, torch.zeros_like(weight), [rounds(k, sweeps) for k in range(sweeps)]
    grid = fit_grid(weight, spec)
    floors = {
        "gram": seconds(lambda: x.T @ x),
        "gptq": seconds(partial(gptq_floor, weight, gram)),
        "quantease": sweeps * seconds(partial(sweep_floor, work, weight, gram)),
    }
    loop = seconds(partial(column_loop, weight, gram, grid, schedule[:2]), repeats=1) * sweeps / 2
    shape, rows = f"{n_out} x {n_in}", []

    def row(what: str, backend: str, ours: float, against: str = "-") -> None:
        peak = machine.peak_bytes(torch.device(device))
        ratio = f"{floors[what]:.3f} | {ours / floors[what]:.2f}"
        memory = (peak["device"] or peak["host"]) / 1e6
        rows.append(f"| {shape} | {what} | {backend} | {ours:.3f} | {ratio} | {against} | {memory:.0f} |")

    row("gram", "torch", seconds(lambda: LayerStats(n_in, device).update(x)))
    row("quantease", "column loop", loop, "1.0")
    for backend in backends:
        blocks._chosen[torch.device(device).type] = backend
        quantease(weight[:64], stats, spec, num_iter=1), gptq(weight[:64], stats, spec)  # compile
        row("gptq", backend.name, seconds(partial(gptq, weight, stats, spec)))
        ours = seconds(partial(quantease, weight, stats, spec, num_iter=sweeps), repeats=2)
        row("quantease", backend.name, ours, f"{loop / ours:.1f}")
    if precision != "highest":
        with products_in(precision):
            ours = seconds(partial(quantease, weight, stats, spec, num_iter=sweeps), repeats=2)
            lower = quantease(weight, stats, spec, num_iter=sweeps).dequantize()
        full = quantease(weight, stats, spec, num_iter=sweeps).dequantize()
        errors = [relative_error(weight, w, gram) for w in (full, lower)]
        row("quantease", f"{backends[0].name}, products {precision}", ours, f"{loop / ours:.1f}")
        rows.append(
            f"| {shape} | objective: float32 {errors[0]:.7f}, products {precision} {errors[1]:.7f} "
            f"| | | | {errors[1] / errors[0] - 1:.1e} relative | | |"
        )
    published, blocked = (f(weight, gram, grid, schedule[:6]) for f in (column_loop, descend))
    errors = [relative_error(weight, w, gram) for w in (published, blocked)]
    same = f"objective after 6 sweeps: column loop {errors[0]:.7f}, ours {errors[1]:.7f}"
    return [*rows, f"| {shape} | {same} | | | | {abs(errors[1] / errors[0] - 1):.1e} relative | | |"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["768x768", "3072x768", "768x3072", "2048x2048"], help="out x in"
    )
    parser.add_argument("--sweeps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", action="store_true", help="also time the plain torch loops")
    parser.add_argument(
        "--precision", default="highest", choices=("highest", "high", "medium"), help="also measure this"
    )
    parser.add_argument("--out", type=Path, help="write the table here as well")
    args = parser.parse_args()
    fastest = kernels(torch.device(args.device))
    backends = [fastest, *([TorchKernels()] if args.reference and fastest.name != "torch" else [])]
    hardware = machine.describe(torch.device(args.device))
    versions = ", ".join(f"{k} {v}" for k, v in machine.versions().items())
    lines = [
        "# Solvers against their floors",
        "",
        f"{hardware}; {versions}; 3 bits, {args.sweeps} sweeps, float32.",
        "",
    ]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip().replace("\n", " "), "", HEADER, "|---" * 8 + "|"]
    out = console()
    for line in lines[-2:]:
        out.print(line, highlight=False, soft_wrap=True)
    for shape in args.shapes:
        n_out, n_in = map(int, shape.split("x"))
        for line in measured(n_out, n_in, args.device, args.sweeps, backends, args.precision):
            lines.append(line)
            out.print(line, highlight=False, soft_wrap=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
