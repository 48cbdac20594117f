"""Tables of methods x bits x models, as markdown and JSON under benchmarks/results/.

    python -m benchmarks.tables demo                  # the five demo models on the demo world
    python -m benchmarks.tables text --name wikitext2-ptb --model DIR --model DIR --calibration train.txt \\
        --evaluation wiki.txt --evaluation ptb.txt --seqlen 256

Every row is an ordinary run of model_quantizer.py; a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from quant.cli.terminal import ProgressBars, console, set_logging
from quant.core import env
from quant.core.text import markdown_cell
from quant.run.config import RunConfig
from quant.run.session import Session
from quant.solvers import get_solver, solver_options

ROOT = Path(__file__).parents[1]
DEMO = [str(Path("models/demo") / family) for family in ("opt", "bloom", "falcon", "llama", "mistral")]
BEST = {"search_grid": True, "refit_grid": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq_quantease": ("gptq_quantease", {}),
    "quantease": ("quantease", {}),
    "quantease, 0.5% outliers": ("quantease", {"outlier": 0.005}),
    "quantease, 1% outliers": ("quantease", {"outlier": 0.01}),
    "quantease, 2% outliers": ("quantease", {"outlier": 0.02}),
    "quantease, 1% columns": ("quantease", {"outlier": 0.01, "structure_outlier": True}),
    "spqr, threshold 0.2": ("spqr", {"outlier": 0.2}),
    "spqr, g16": ("spqr", {"outlier": 0.2, "group_size": 16}),
    "gptq, mse range": ("gptq", {"range": "mse"}),
    "quantease, mse range": ("quantease", {"range": "mse"}),
    "quantease, searched and refitted": ("quantease", BEST),
    "quantease, preset best": ("quantease", {"range": "mse", **BEST}),
}
BASIC = ("rtn", "gptq", "quantease")


@dataclass(frozen=True)
class Row:
    """One finished run: its model, its name in the tables, results.json and journal."""

    model: str
    label: str
    results: dict[str, Any]

    @property
    def setting(self) -> str:
        """Bits and groups, as two cells."""
        group = self.results["group_size"]
        return f"{self.results['wbits']} | {'row' if group == -1 else group}"

    def errors(self) -> list[float]:
        """Relative error of every linear."""
        journal = Path(self.results["run_dir"]) / "journal.jsonl"
        return [json.loads(line)["relative_error"] for line in journal.open()]


def configs(args: argparse.Namespace, model: str, bits: int, group: int) -> dict[str, RunConfig]:
    """The variants for one model and grid, true-sequential, with each method's own defaults."""
    found = {}
    for label in args.variants:
        method, options = VARIANTS[label]
        own = options.get("group_size")  # a variant with groups of its own is one row, not one for each of --groups
        if own is not None and group != args.groups[0]:
            continue
        grouped = group if own is None else own
        place = "".join(c if c.isalnum() or c == "_" else "-" for c in f"{label}-w{bits}g{grouped}")
        found[label] = RunConfig(
            model=model,
            dataset=args.calibration,
            eval_datasets=tuple(args.evaluation),
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            limit=args.limit,
            method=method,
            wbits=bits,
            group_size=grouped,
            range=options.get("range", "minmax"),
            options=solver_options(get_solver(method))
            | {k: v for k, v in options.items() if k not in ("range", "group_size")},
            true_sequential=True,
            calib_batch=16,
            run_dir=Path("runs") / "tables" / args.name / Path(model).name / place,
        )
    return found


def quality_rows(rows: list[Row]) -> list[str]:
    """One markdown row a run and corpus."""
    lines = []
    for row in rows:
        r = row.results
        for name, scores in r["perplexity"].items():
            low, high = scores["ratio_ci95"]
            lines.append(
                f"| {markdown_cell(Path(row.model).name)} | {row.setting} | {row.label} "
                f"| {r['bits_per_weight']:.3f} | {markdown_cell(name)} "
                f"| {scores['fp']:.3f} | {scores['quantized']:.3f} | {low:.4f}-{high:.4f} "
                f"| {r['fidelity'][name]['kl_divergence']:.5f} | {r['mean_relative_error']:.5f} |"
            )
    return lines


def stage_rows(rows: list[Row]) -> list[str]:
    """Seconds by stage and shares of the quantization itself."""
    lines = []
    for row in rows:
        s = row.results["seconds"]
        whole = s["forward"] + s["gram"] + s["solve"]
        shares = " | ".join(f"{s[k]:.2f} ({s[k] / whole:.0%})" for k in ("forward", "gram", "solve"))
        lines.append(
            f"| {markdown_cell(Path(row.model).name)} | {row.setting} | {row.label} | {s['load']:.1f} | {shares} "
            f"| {s['evaluate']:.1f} | {row.results['peak_bytes']['host'] / 1e9:.2f} |"
        )
    return lines


def error_rows(rows: list[Row]) -> list[str]:
    """Mean relative error of the linears, and for how many of them it is below that of rtn and of gptq."""
    lines = []
    for row in rows:
        others = {r.label: r.errors() for r in rows if (r.model, r.setting) == (row.model, row.setting)}
        own = row.errors()
        below = [
            f"{sum(a < b for a, b in zip(own, others[base], strict=True))} of {len(own)}" if base in others else "-"
            for base in ("rtn", "gptq")
        ]
        lines.append(
            f"| {markdown_cell(Path(row.model).name)} | {row.setting} | {row.label} | {mean(own):.5f} | {' | '.join(below)} |"
        )
    return lines


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
    parser.add_argument("--quality-only", action="store_true", help="no table of seconds: the machine is not quiet")
    parser.add_argument("--groups", type=int, nargs="+", default=[-1])
    parser.add_argument("--variants", nargs="+", default=list(BASIC), help=f"of: {', '.join(VARIANTS)}; or all")
    args = parser.parse_args()
    args.evaluation = args.evaluation or ["demo"]
    args.variants = list(VARIANTS) if args.variants == ["all"] else args.variants
    set_logging("warning")
    rows: list[Row] = []
    out = console()
    for model in args.model or DEMO:
        session: Session | None = None
        for bits, group in ((b, g) for b in args.bits for g in args.groups):
            plans = configs(args, model, bits, group)
            session = session or Session(next(iter(plans.values())))
            with ProgressBars(out) as bars:
                finished = session.run_all(
                    list(plans.values()),
                    lambda m, b=bits, g=group, n=Path(model).name: bars.for_method(f"{n} {m} w{b} g{g}"),
                )
            rows += [Row(model, label, results) for label, results in zip(plans, finished, strict=True)]
    assert session is not None
    write(args, rows, session)
    out.print(f"benchmarks/results/{args.name}.md")


def seconds_section(head: str, rows: list[Row]) -> list[str]:
    """Seconds by stage."""
    return [
        "## Seconds and peak memory",
        "",
        "forward: calibration passes through the blocks; gram: accumulation of x xᵀ; solve: the solvers, with the error "
        "measurements of the journal. Shares are of the sum of these three. The methods of a row of bits and groups are "
        "evaluated together; evaluate is an equal share of that. Host memory is the process's peak so far.",
        "",
        f"{head} load s | forward s | gram s | solve s | evaluate s | host GB |",
        "|---" * 10 + "|",
        *stage_rows(rows),
        "",
    ]


def write(args: argparse.Namespace, rows: list[Row], session: Session) -> None:
    """The three tables as markdown, and what they were measured on."""
    versions = ", ".join(f"{k} {v}" for k, v in env.versions().items())
    shown = [Path(source).name for source in (args.calibration, *args.evaluation)]
    windows = f"the first {args.limit}" if args.limit else "all"
    head = "| model | bits | group | method |"
    text = [
        f"# {args.name}: {len(args.variants)} methods at {', '.join(map(str, args.bits))} bits",
        "",
        f"Asymmetric grids, min-max unless the name says otherwise, true-sequential. Calibration {shown[0]}, {args.nsamples} windows of "
        f"{args.seqlen} tokens, seed 0. Perplexity: {windows} windows of {args.seqlen} tokens without overlap, on "
        f"{', '.join(shown[1:])}; the interval is that of the ratio of the perplexities. "
        f"{session.device.type}, {env.describe(session.device)['threads']} threads, float32 arithmetic. {versions}.",
        "",
        f"{head} bits per weight | data | ppl before | ppl after | ratio, 95% interval | KL divergence "
        "| mean relative error |",
        "|---" * 11 + "|",
        *quality_rows(rows),
        "",
        "## Relative error of the linears",
        "",
        "Mean over linears; for how many linears it is lower than with rtn, with gptq. Every method is measured on the "
        "activations of its own quantized prefix.",
        "",
        f"{head} mean relative error | below rtn | below gptq |",
        "|---" * 7 + "|",
        *error_rows(rows),
        "",
    ]
    if not args.quality_only:
        text += seconds_section(head, rows)
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / f"{args.name}.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
