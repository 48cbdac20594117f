"""Solver time against the floor: the bare matrix products of the same sweeps, in one run, as ratios.

    python -m benchmarks.solvers [--shapes 768x768 2048x2048] [--sweeps 30] [--device cpu]

Floors: quantease 2·out·in² flops a sweep in blocks of 128 columns; gptq the products of its block updates,
out·in² flops, and one Cholesky factorization; gram 2·tokens·in². column loop: the published formulation, one
matrix-vector product a column over the whole matrix, timed for two sweeps and scaled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from quant.core.cli import console
from quant.core.grid import fit_grid
from quant.core.linalg import relative_error
from quant.core.stats import LayerStats
from quant.core.types import QuantSpec
from quant.gptq import gptq
from quant.kernels.blocks import quantize_column
from quant.quantease import quantease

BLOCK = 128


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


def column_loop(weight: Tensor, gram: Tensor, spec: QuantSpec, sweeps: int) -> Tensor:
    """Coordinate descent a column at a time: u_j from the products of all columns with N_j = Σ_j / Σ_jj."""
    grid = fit_grid(weight, spec)
    scale, zero = grid.scale[:, 0], grid.zero[:, 0].float()
    normalized = gram / gram.diagonal()
    target = weight @ normalized
    normalized.fill_diagonal_(0)
    current = weight.clone()
    for _ in range(sweeps):
        for j in range(weight.shape[1]):
            u = target[:, j] - current @ normalized[:, j]
            current[:, j] = (quantize_column(u, scale, zero, grid.qmax) - zero) * scale
    return current


def sweep_floor(residual: Tensor, gram: Tensor) -> None:
    """The matrix products of one coordinate-descent sweep."""
    for start in range(0, gram.shape[0], BLOCK):
        torch.mm(gram[start : start + BLOCK], residual)


def gptq_floor(work: Tensor, gram: Tensor) -> None:
    """The matrix products of GPTQ's block updates, and its factorization."""
    upper = torch.linalg.cholesky(gram)
    for start in range(0, gram.shape[0] - BLOCK, BLOCK):
        end = start + BLOCK
        torch.mm(upper[start:end, end:].T, work[start:end])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "2048x2048"], help="out x in")
    parser.add_argument("--sweeps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    table = Table("out x in", "what", "seconds", "floor", "times the floor", "column loop / ours", header_style="bold")
    for shape in args.shapes:
        n_out, n_in = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        mixing = torch.eye(n_in) + torch.randn(n_in, n_in, generator=generator) / n_in**0.5
        x = (torch.randn(2 * n_in, n_in, generator=generator) @ mixing).to(args.device)
        weight = torch.randn(n_out, n_in, generator=generator).to(args.device)
        stats, spec = LayerStats(n_in, args.device), QuantSpec(3)
        stats.update(x)
        gram, residual = stats.gram, torch.randn(n_in, n_out, generator=generator).to(args.device)
        quantease(weight[:64], stats, spec, num_iter=1), gptq(weight[:64], stats, spec)  # compile
        floors = {
            "gram": seconds(lambda x=x: x.T @ x),
            "gptq": seconds(partial(gptq_floor, residual, gram)),
            "quantease": args.sweeps * seconds(partial(sweep_floor, residual, gram)),
        }
        ours = {
            "gram": seconds(lambda x=x, n=n_in: LayerStats(n, args.device).update(x)),
            "gptq": seconds(partial(gptq, weight, stats, spec)),
            "quantease": seconds(partial(quantease, weight, stats, spec, num_iter=args.sweeps), repeats=1),
        }
        loop = seconds(partial(column_loop, weight, gram, spec, 2), repeats=1) * args.sweeps / 2
        for name, time_ours in ours.items():
            ratio = f"{loop / time_ours:.1f}" if name == "quantease" else "-"
            table.add_row(
                shape, name, f"{time_ours:.3f}", f"{floors[name]:.3f}", f"{time_ours / floors[name]:.2f}", ratio
            )
        same = [
            relative_error(weight, w, gram)
            for w in (
                column_loop(weight, gram, spec, 3),
                quantease(weight, stats, spec, num_iter=3, relax=False).dequantize(),
            )
        ]
        table.add_row(shape, f"objective after 3 sweeps: column loop {same[0]:.6f}, ours {same[1]:.6f}", "", "", "", "")
    console().print(table)


if __name__ == "__main__":
    main()
