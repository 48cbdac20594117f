"""Solver time against the floor: the bare matrix products of the same sweeps, in one run, as ratios.

    python -m benchmarks.solvers [--shapes 768x768 2048x2048] [--sweeps 30] [--device cpu] [--out results.md]

Floors: quantease 2·out·in² flops a sweep in blocks of 128 columns; gptq the products of its block updates,
out·in² flops, and one Cholesky factorization; gram the dense product, 2·tokens·in² flops. column loop: the published
accelerated formulation restated, one product of the whole matrix a sweep and one matrix-vector product over the columns
before it a column; run once, over all sweeps, and the objective that it and ours end at is shown, in float64 as well:
a weight on the edge between two codes goes either way with the last bit of float32, and the paths part there. Other
times are the best of a few runs; "times the floor" is a row's seconds divided by the floor of the same row. peak MB: of
the process (of the device on CUDA) while the row ran, what was in use before included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import about, best_seconds, flags, machine_line, peak_of, report
from quant.core import env
from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.linalg import products_in, relative_error
from quant.core.types import Grid, QuantSpec
from quant.kernels import columns as blocks
from quant.kernels.columns import Kernels, TorchKernels, kernels
from quant.solvers.gptq import gptq
from quant.solvers.quantease import Descent, is_rounding_sweep, quantease

BLOCK = 128
COLUMNS = (
    "out x in",
    "what",
    "backend",
    "seconds",
    "floor, seconds",
    "times the floor",
    "column loop / ours",
    "peak MB",
)


def column_loop(weight: Tensor, gram: Tensor, grid: Grid, rounding: list[bool]) -> Tensor:
    """The published accelerated form: u_j = P_j - P̂_j + Σ_{k<j} (Ŵ_k of before - Ŵ_k) N_kj, with N = Σ / diag(Σ).

    P = W N is formed once; P̂ = Ŵ N, N with a zero diagonal there, at the start of every sweep.
    """
    scale, zero = grid.scale[:, 0], grid.zero[:, 0].float()
    normalized = gram / gram.diagonal()
    target = weight @ normalized
    normalized.fill_diagonal_(0)
    by_column = normalized.T.contiguous()  # row j is N_j
    current, moved = weight.clone(), torch.empty_like(weight)
    for rounds_now in rounding:
        start = target - current @ normalized
        for j in range(weight.shape[1]):
            u = torch.addmv(start[:, j], moved[:, :j], by_column[j, :j])
            if rounds_now:
                u = grid.numbers.values(u, scale, zero)
            moved[:, j] = current[:, j] - u
            current[:, j] = u
    return current


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


def measure(n_out: int, n_in: int, args: argparse.Namespace, backends: list[Kernels]) -> Iterator[dict[str, str]]:
    """The rows of one shape."""
    device, sweeps = torch.device(args.device), args.sweeps
    weight, x = problem(n_out, n_in, args.device)
    stats, spec = GramStats(n_in, device), QuantSpec(3)
    stats.update(x)
    gram, work, schedule = stats.gram, torch.zeros_like(weight), [is_rounding_sweep(k, sweeps) for k in range(sweeps)]
    grid = fit_grid(weight, spec)
    floors = {
        "gram": best_seconds(lambda: x.T @ x, device),
        "gptq": best_seconds(partial(gptq_floor, weight, gram), device),
        "quantease": sweeps * best_seconds(partial(sweep_floor, work, weight, gram), device),
    }
    loop = 0.0

    def record(*cells: str) -> dict[str, str]:
        return dict(zip(COLUMNS, (f"{n_out} x {n_in}", *cells), strict=True))

    def timed(what: str, backend: str, work: Callable[[], object], repeats: int = 3) -> dict[str, str]:
        nonlocal loop
        env.reset_peak(device)
        took = best_seconds(work, device, repeats)
        loop = loop or (took if what == "quantease" else 0.0)  # the column loop is the first of its rows
        against = f"{loop / took:.1f}" if what == "quantease" else "-"
        floor = floors[what]
        return record(
            what, backend, f"{took:.3f}", f"{floor:.3f}", f"{took / floor:.2f}", against, f"{peak_of(device) / 1e6:.0f}"
        )

    yield timed("gram", "torch", lambda: GramStats(n_in, device).update(x))
    published: list[Tensor] = []
    yield timed(
        "quantease", "column loop", lambda: published.append(column_loop(weight, gram, grid, schedule)), repeats=1
    )
    ours = partial(quantease, weight, stats, spec, grid=grid, num_iter=sweeps)
    ends = {"column loop": relative_error(weight, published.pop(), gram)}
    for backend in backends:
        blocks._chosen[device.type] = backend
        quantease(weight[:64], stats, spec, num_iter=1), gptq(weight[:64], stats, spec)  # compile
        yield timed("gptq", backend.name, partial(gptq, weight, stats, spec))
        yield timed("quantease", backend.name, ours, repeats=2)
        ends[backend.name] = relative_error(weight, ours().dequantize(), gram)
    if args.precision != "highest":
        blocks._chosen[device.type] = backends[0]
        with products_in(args.precision):
            lower = f"{backends[0].name}, products {args.precision}"
            yield timed("quantease", lower, ours, repeats=2)
            answer = ours().dequantize()
        ends[lower] = relative_error(weight, answer, gram)
    if args.float64:
        ends |= in_float64(weight, gram, grid, schedule)
    for name, end in ends.items():
        against = f"{end / ends['column loop'] - 1:+.1e} relative"
        yield record(f"objective after {sweeps} sweeps", name, f"{end:.7f}", "", against, "", "")


def in_float64(weight: Tensor, gram: Tensor, grid: Grid, schedule: list[bool]) -> dict[str, float]:
    """Relative errors that the column loop and our order of sums end at when neither rounds to float32."""
    wide, products, exact = weight.double(), gram.double(), replace(grid, scale=grid.scale.double())
    blocks._chosen[weight.device.type] = TorchKernels()
    descent = Descent(wide, products, exact, BLOCK)
    for rounding in schedule:
        descent.sweep(rounding)
    answers = {"column loop": column_loop(wide, products, exact, schedule), "torch": wide - descent.residual}
    return {f"{name}, float64": relative_error(wide, answer, products) for name, answer in answers.items()}


def main() -> None:
    """Measure, print and write."""
    parser = flags(__doc__, device="cpu")
    shapes = ["768x768", "3072x768", "768x3072", "2048x2048"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="out x in")
    parser.add_argument("--sweeps", type=int, default=30)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--reference", action=switch, default=True, help="also time the plain torch loops")
    parser.add_argument("--float64", action=switch, default=True, help="objectives in float64 too")
    precisions = ("highest", "high", "medium")
    parser.add_argument("--precision", default="highest", choices=precisions, help="also measure this")
    args = parser.parse_args()
    fastest = kernels(torch.device(args.device))
    backends = [fastest, *([TorchKernels()] if args.reference and fastest.name != "torch" else [])]
    machine = machine_line(env.describe(torch.device(args.device)), env.versions())
    head = [
        "# Solvers against their floors",
        "",
        f"{machine}; 3 bits, {args.sweeps} sweeps, float32.",
        "",
        about(__doc__),
        "",
    ]
    shapes = [map(int, shape.split("x")) for shape in args.shapes]
    report(head, (record for shape in shapes for record in measure(*shape, args, backends)), args.out)


if __name__ == "__main__":
    main()
