"""Relative errors of the linears under searched grids, all from one set of full-precision statistics a model.

    python -m benchmarks.searched_grids --model DIR [--model DIR] --calibration brown.txt [--bits 2 3 4] [--blocks N]

Writes benchmarks/results/searched-grids.md: a table a model and width; the linears of block 0 named below, and the mean over all.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from quant.cli.terminal import console, set_logging
from quant.core import env
from quant.core.text import markdown_cell
from quant.run.config import RunConfig
from quant.run.session import Session
from quant.solvers import get_solver, solver_options

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "quantease, minmax": ("quantease", "minmax", {}),
    "quantease, mse": ("quantease", "mse", {}),
    "quantease, mse + search": ("quantease", "mse", {"search_grid": True}),
    "quantease, mse + refit": ("quantease", "mse", {"refit_grid": True}),
    "quantease, mse + search + refit": ("quantease", "mse", {"search_grid": True, "refit_grid": True}),
    "gptq, mse": ("gptq", "mse", {}),
    "gptq_quantease, mse": ("gptq_quantease", "mse", {}),
    "gptq_quantease, mse + refit": ("gptq_quantease", "mse", {"refit_grid": True}),
}
SHOWN = ("q_proj", "up_proj", "fc1", "down_proj", "fc2")


def tables(model: str, args: argparse.Namespace) -> list[str]:
    """A model's tables, one a width."""
    base = RunConfig(
        model=model, dataset=args.calibration, eval_datasets=(), nsamples=args.nsamples, seqlen=args.seqlen,
        wbits=args.bits[0], calib_batch=16, num_layers=args.blocks,
    )  # fmt: skip
    configs = [
        replace(base, method=method, wbits=bits, range=kind, options=solver_options(get_solver(method)) | options)
        for bits in args.bits
        for method, kind, options in METHODS.values()
    ]
    records = Session(base).compare_layers(configs)
    n = len(configs)  # a linear's records follow each other in the order of the configurations
    names = [r["name"] for r in records[::n] if r["block"] == 0 and r["name"].split(".")[-1] in SHOWN]
    lines = []
    for k, bits in enumerate(args.bits):
        lines += [
            f"| {markdown_cell(Path(model).name)}, {bits} bits | {' | '.join(names)} | mean |",
            "|---" * (len(names) + 2) + "|",
        ]
        for i, label in enumerate(METHODS):
            own = records[k * len(METHODS) + i :: n]
            first = {r["name"]: r["relative_error"] for r in own if r["block"] == 0}
            cells = " | ".join(f"{first[name]:.4f}" for name in names)
            lines.append(f"| {label} | {cells} | {mean(r['relative_error'] for r in own):.5f} |")
        lines.append("")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--blocks", type=int, default=1000, help="only the first N blocks")
    args = parser.parse_args()
    set_logging("warning")
    blocks = "all linears" if args.blocks >= 1000 else f"the linears of the first {args.blocks} block(s)"
    versions = ", ".join(f"{k} {v}" for k, v in env.versions().items())
    lines = [
        "# Searched grids, one scale a row",
        "",
        f"Relative error. Calibration {Path(args.calibration).name}, {args.nsamples} windows of {args.seqlen} tokens, seed 0; "
        f"every method from the same full-precision statistics. Means over {blocks} of a model. {versions}.",
        "",
    ]
    for model in args.model:
        lines += tables(model, args)
    out = Path(__file__).parent / "results" / "searched-grids.md"
    out.write_text("\n".join(lines))
    terminal = console()
    for line in lines:
        terminal.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
