"""Solvers at the shapes of an 8B model's linears, per row and in groups: seconds beside those of the products that each declares.

    python -m benchmarks.solver_shapes [--shapes 4096x4096 14336x4096 4096x14336] [--groups -1 128] [--sweeps 3] [--out results.md]

The products are those that a plan counts (the factorization and what blocks of columns send to those behind them; of coordinate
descent every sweep), at the rate of a float32 product of 2048 x 2048 that is measured in the same run before every row. Weights are
Gaussian, the Gram matrix is that of 1,024 correlated inputs. A row is one run. errors: the seconds of the answer's relative
error, which a run measures too. peak GB: of the process while the solver ran.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measuring import about, best_seconds, flags, machine_line, peak_of, report
from quant.core import env
from quant.core.gram import GramStats
from quant.core.linalg import relative_error
from quant.core.types import QuantizedWeight, QuantSpec
from quant.solvers import declaration_of, get_solver, with_defaults

TOKENS = 1024
RATE_SIZE = 2048


def problem(n_out: int, n_in: int, device: torch.device) -> tuple[Tensor, GramStats]:
    """Gaussian weights [out, in] and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(TOKENS, n_in // 16, generator=generator) @ torch.randn(n_in // 16, n_in, generator=generator)
    x = few / (n_in // 16) ** 0.5 + torch.randn(TOKENS, n_in, generator=generator)
    stats = GramStats(n_in, device)
    stats.update(x.to(device))
    return torch.randn(n_out, n_in, generator=generator).to(device), stats


def records(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A row for every shape, group size and method."""
    device = torch.device(args.device)
    for shape in args.shapes:
        n_out, n_in = map(int, shape.split("x"))
        weight, stats = problem(n_out, n_in, device)
        for group in args.groups:
            for method in args.methods:
                row = {"out x in": f"{n_out} x {n_in}", "group": "row" if group == -1 else str(group), "method": method}
                yield row | measure(method, weight, stats, QuantSpec(args.wbits, group), args.sweeps)


def measure(method: str, weight: Tensor, stats: GramStats, spec: QuantSpec, sweeps: int) -> dict[str, str]:
    """One run of a solver, after one on a few rows that compiles what it needs."""
    device, options = weight.device, {}
    if "num_iter" in with_defaults(method, {}):
        options["num_iter"] = sweeps
    solve = get_solver(method)
    solve(weight[:64, :256], _whitened(256, device), spec, **options)
    square = torch.randn(RATE_SIZE, RATE_SIZE, device=device)
    rate = 2 * RATE_SIZE**3 / best_seconds(lambda: square @ square, device)
    env.reset_peak(device)
    answers: list[QuantizedWeight] = []
    took = best_seconds(lambda: answers.append(solve(weight, stats, spec, **options)), device, repeats=1)
    peak = peak_of(device)
    values = answers.pop().dequantize()
    errors = best_seconds(lambda: relative_error(weight, values, stats.gram), device, repeats=1)
    floor = declaration_of(method).flops(*weight.shape, with_defaults(method, options)) / rate
    return {
        "seconds": f"{took:.1f}",
        "products, s": f"{floor:.1f}",
        "times": f"{took / floor:.2f}",
        "errors, s": f"{errors:.1f}",
        "peak GB": f"{peak / 1e9:.2f}",
    }


def _whitened(n: int, device: torch.device) -> GramStats:
    """Statistics of n inputs that have nothing to do with each other."""
    stats = GramStats(n, device)
    stats.update(torch.eye(n, device=device))
    return stats


def main() -> None:
    """Measure, print and write."""
    parser = flags(__doc__, device="cpu")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"], help="out x in")
    parser.add_argument("--groups", nargs="+", type=int, default=[-1, 128])
    parser.add_argument("--methods", nargs="+", default=["gptq", "quantease", "spqr"])
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--sweeps", type=int, default=3)
    args = parser.parse_args()
    machine = machine_line(env.describe(torch.device(args.device)), env.versions())
    head = ["# Solvers at real shapes", "", f"{machine}; {args.wbits} bits, {args.sweeps} sweeps, float32.", ""]
    report([*head, about(__doc__), ""], records(args), args.out)


if __name__ == "__main__":
    main()
