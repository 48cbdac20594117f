"""Tables of methods x bits x models, as markdown and JSON under benchmarks/results/.

    python -m benchmarks.tables demo                  # the five demo models on the demo world
    python -m benchmarks.tables text --name wikitext2-ptb --model DIR --model DIR --calibration train.txt \\
        --evaluation wiki.txt --evaluation ptb.txt --seqlen 256

Every row is an ordinary run of model_quantizer.py; a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from quant.core import machine
from quant.core.cli import ProgressBars, console, set_logging
from quant.core.registry import get_solver, solver_options
from quant.core.run import RunConfig, Session

ROOT = Path(__file__).parents[1]
DEMO = [str(Path("models/demo") / family) for family in ("opt", "bloom", "falcon", "llama", "mistral")]
METHODS = ("rtn", "gptq", "quantease")


def configs(args: argparse.Namespace, model: str) -> list[RunConfig]:
    """Methods x bits for one model, true-sequential, with each method's own defaults."""
    return [
        RunConfig(
            model=model,
            dataset=args.calibration,
            eval_datasets=tuple(args.evaluation),
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            limit=args.limit,
            method=method,
            wbits=bits,
            options=solver_options(get_solver(method)),
            true_sequential=True,
            calib_batch=16,
            run_dir=Path("runs") / "tables" / args.name / Path(model).name / f"{method}-w{bits}",
        )
        for bits in args.bits
        for method in METHODS
    ]


def journal(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The journal of a finished run."""
    return [json.loads(line) for line in (Path(results["run_dir"]) / "journal.jsonl").open()]


def quality_rows(model: str, finished: list[dict[str, Any]]) -> list[str]:
    """One markdown row a run and corpus."""
    rows = []
    for results in finished:
        for name, scores in results["perplexity"].items():
            low, high = scores["ratio_ci95"]
            rows.append(
                f"| {Path(model).name} | {results['wbits']} | {results['method']} | {results['bits_per_weight']:.3f} | {name} "
                f"| {scores['fp']:.3f} | {scores['quantized']:.3f} | {low:.4f}-{high:.4f} "
                f"| {results['fidelity'][name]['kl_divergence']:.5f} | {results['mean_relative_error']:.5f} "
                f"| {results['seconds']['solve']:.1f} | {results['seconds']['total']:.1f} |"
            )
    return rows


def stage_rows(model: str, finished: list[dict[str, Any]]) -> list[str]:
    """Seconds by stage and shares of the quantization itself."""
    rows = []
    for results in finished:
        s = results["seconds"]
        whole = s["forward"] + s["gram"] + s["solve"]
        shares = " | ".join(f"{s[k]:.2f} ({s[k] / whole:.0%})" for k in ("forward", "gram", "solve"))
        rows.append(
            f"| {Path(model).name} | {results['wbits']} | {results['method']} | {s['load']:.1f} | {shares} "
            f"| {s['evaluate']:.1f} | {results['peak_bytes']['host'] / 1e9:.2f} |"
        )
    return rows


def error_rows(model: str, finished: list[dict[str, Any]]) -> list[str]:
    """Relative errors of the linears against each other: means, and for how many linears a method is below another."""
    rows = []
    for bits in dict.fromkeys(results["wbits"] for results in finished):
        errors = {r["method"]: [line["relative_error"] for line in journal(r)] for r in finished if r["wbits"] == bits}
        n = len(errors["rtn"])
        below = [
            sum(a < b for a, b in zip(errors[x], errors[y], strict=True))
            for x, y in (("gptq", "rtn"), ("quantease", "gptq"))
        ]
        means = " | ".join(f"{mean(errors[m]):.5f}" for m in METHODS)
        rows.append(f"| {Path(model).name} | {bits} | {means} | {below[0]} of {n} | {below[1]} of {n} |")
    return rows


def main() -> None:
    """Run all rows, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "text"))
    parser.add_argument("--name", default="demo", help="of the files under benchmarks/results/")
    parser.add_argument("--model", action="append")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--evaluation", action="append")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--limit", type=int, help="evaluate the first N windows of each text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    args = parser.parse_args()
    args.evaluation = args.evaluation or ["demo"]
    set_logging("warning")
    quality, stages, errors = [], [], []
    out = console()
    for model in args.model or DEMO:
        plans = configs(args, model)
        session = Session(plans[0])
        with ProgressBars(out) as bars:
            finished = [session.run(c, bars.for_method(f"{Path(model).name} {c.method} w{c.wbits}")) for c in plans]
        quality += quality_rows(model, finished)
        stages += stage_rows(model, finished)
        errors += error_rows(model, finished)
    versions = ", ".join(f"{k} {v}" for k, v in machine.versions().items())
    shown = [Path(source).name for source in (args.calibration, *args.evaluation)]
    windows = f"the first {args.limit}" if args.limit else "all"
    text = [
        f"# {args.name}: rtn, gptq, quantease at {', '.join(map(str, args.bits))} bits",
        "",
        f"Per row, asymmetric min-max grids, true-sequential. Calibration {shown[0]}, {args.nsamples} windows of "
        f"{args.seqlen} tokens, seed 0. Perplexity: {windows} windows of {args.seqlen} tokens without overlap, on "
        f"{', '.join(shown[1:])}. "
        f"{session.device.type}, {machine.describe(session.device)['threads']} threads, float32 arithmetic. {versions}.",
        "",
        "| model | bits | method | bits per weight | data | ppl before | ppl after | ratio, 95% interval | KL divergence "
        "| mean relative error | solve s | total s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *quality,
        "",
        "## Relative error of the linears",
        "",
        "Mean over linears; how many linears have a lower error than the method before. Every method is measured on "
        "the activations of its own quantized prefix.",
        "",
        "| model | bits | rtn | gptq | quantease | gptq below rtn | quantease below gptq |",
        "|---|---|---|---|---|---|---|",
        *errors,
        "",
        "## Seconds and peak memory",
        "",
        "forward: calibration passes through the blocks; gram: accumulation of x xᵀ; solve: the solvers, with the error "
        "measurements of the journal. Shares are of the sum of these three. Host memory is the process's peak so far.",
        "",
        "| model | bits | method | load s | forward s | gram s | solve s | evaluate s | host GB |",
        "|---|---|---|---|---|---|---|---|---|",
        *stages,
        "",
    ]
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / f"{args.name}.md").write_text("\n".join(text))
    out.print(f"benchmarks/results/{args.name}.md")


if __name__ == "__main__":
    main()
