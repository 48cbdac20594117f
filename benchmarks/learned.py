"""Learned methods against rounding alone, as markdown under benchmarks/results/.

    python -m benchmarks.learned demo                                  # the five demo models on the demo world
    python -m benchmarks.learned text --name learned-text --model DIR --calibration train.txt --evaluation test.txt

Every row is an ordinary run of main.py; a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from quant.blocks.actquant import ActSpec
from quant.cli.terminal import ProgressBars, console, set_logging
from quant.core import env
from quant.core.text import markdown_cell
from quant.learn import recipes
from quant.learn.abq import balanced_levels
from quant.learn.config import Learning, TransformSpec
from quant.run.config import RunConfig
from quant.run.session import Session
from quant.solvers import get_solver, solver_options

ROOT = Path(__file__).parents[1]
DEMO = [str(Path("models/demo") / family) for family in ("opt", "bloom", "falcon", "llama", "mistral")]
SETTINGS = {"W3A16": (3, 16, -1), "W2A16g64": (2, 16, 64), "W4A4": (4, 4, -1), "W6A6": (6, 6, -1), "W2A8": (2, 8, -1)}
VARIANTS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "omniquant": {"method": "omniquant"},
    "affinequant": {"method": "affinequant"},
    "abq": {"method": "abq"},
    "quantease": {"solver": "quantease"},
    "omniquant + quantease": {"method": "omniquant", "solver": "quantease"},
    "omniquant, lwc alone": {"method": "omniquant", "let": False},
    "omniquant, let alone": {"method": "omniquant", "clip": False},
    "abq, 2^bits levels": {"method": "abq", "balance": "off"},
    "abq, no attention loss": {"method": "abq", "without": {"attention": False}},
    "abq, no compensation": {"method": "abq", "without": {"compensation": False}},
    "abq, squared error alone": {"method": "abq", "without": {"distribution": False, "attention": False}},
    "abq, no mul seam": {"method": "abq", "kinds": ("norm", "vo", "qk")},
    "affinequant, norm matrices": {"method": "affinequant", "norm_matrix": True},
}
MAIN = ("rtn", "omniquant", "affinequant", "abq")
COMPOSED = ("quantease", "omniquant + quantease")  # weight-only settings


@dataclass(frozen=True)
class Row:
    """One finished run."""

    model: str
    setting: str
    label: str
    results: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Perplexity over that of full precision, mean over corpora."""
        return mean(s["quantized"] / s["fp"] for s in self.results["perplexity"].values())


def learning_for(args: argparse.Namespace, label: str, wbits: int, abits: int) -> Learning | None:
    """The recipe of a variant with the benchmark's training length."""
    variant = VARIANTS[label]
    if "method" not in variant:
        return None
    affine = variant["method"] == "affinequant"
    transform = TransformSpec(
        let=variant.get("let", True),
        kinds=variant.get("kinds", ()),
        matrix=affine and abits < 16,
        norm_matrix=variant.get("norm_matrix", affine and abits == 16),
        stability=args.sf,
        shift="kinds" in variant and abits < 16,
    )
    asked = Learning(
        transform=transform,
        clip=variant.get("clip", True),
        epochs=args.epochs,
        let_lr=args.let_lr,
        lwc_lr=args.lwc_lr,
        augmented=wbits == 2,
    )
    return replace(recipes()[variant["method"]](asked, wbits, abits), **variant.get("without", {}))


def config_for(args: argparse.Namespace, model: str, setting: str, label: str) -> RunConfig:
    """An ordinary run."""
    wbits, abits, group = SETTINGS[setting]
    variant = VARIANTS[label]
    solver = variant.get("solver", "rtn")
    place = "".join(c if c.isalnum() else "-" for c in f"{label}-{setting}")
    is_abq = variant.get("method") == "abq"
    return RunConfig(
        model=model,
        dataset=args.calibration,
        eval_datasets=tuple(args.evaluation),
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        limit=args.limit,
        method=label,
        solver=solver,
        options=solver_options(get_solver(solver)),
        true_sequential=True,
        wbits=wbits,
        group_size=group,
        levels=balanced_levels(wbits, variant.get("balance", "auto" if is_abq else "off")),
        act=ActSpec(abits, abits),
        learning=learning_for(args, label, wbits, abits),
        calib_batch=8,
        run_dir=Path("runs") / "tables" / args.name / Path(model).name / place,
    )


def quality_rows(rows: list[Row]) -> list[str]:
    """One markdown row a run and corpus."""
    lines = []
    for row in rows:
        r = row.results
        losses = [log["loss_end"] / log["loss_start"] for log in r["learning"]]
        for name, scores in r["perplexity"].items():
            low, high = scores["ratio_ci95"]
            lines.append(
                f"| {markdown_cell(Path(row.model).name)} | {row.setting} | {row.label} "
                f"| {r['bits_per_weight']:.3f} | {markdown_cell(name)} "
                f"| {scores['fp']:.3f} | {scores['quantized']:.3f} | {low:.4f}-{high:.4f} "
                f"| {r['fidelity'][name]['kl_divergence']:.5f} | {f'{mean(losses):.3f}' if losses else '-'} "
                f"| {r['seconds']['learn']:.0f} |"
            )
    return lines


def mean_rows(rows: list[Row]) -> list[str]:
    """Means over models, and for how many models a variant is below rtn, and below omniquant."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        for label in dict.fromkeys(row.label for row in rows if row.setting == setting):
            own = {row.model: row for row in rows if (row.setting, row.label) == (setting, label)}
            below = []
            for base in ("rtn", "omniquant"):
                other = {row.model: row for row in rows if (row.setting, row.label) == (setting, base)}
                shared = own.keys() & other.keys()
                below.append(f"{sum(own[m].ratio < other[m].ratio for m in shared)} of {len(shared)}")
            kl = mean(f["kl_divergence"] for row in own.values() for f in row.results["fidelity"].values())
            lines.append(
                f"| {setting} | {label} | {mean(row.ratio for row in own.values()):.4f} | {kl:.5f} | {' | '.join(below)} |"
            )
    return lines


def main() -> None:
    """Run all rows, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "text"))
    parser.add_argument("--name", default="learned-demo", help="of the file under benchmarks/results/")
    parser.add_argument("--model", action="append")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--evaluation", action="append")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--let-lr", type=float, default=5e-3)
    parser.add_argument(
        "--lwc-lr", type=float, default=5e-2, help="five times the papers': training is that much shorter"
    )
    parser.add_argument("--sf", type=float, default=0.1)
    parser.add_argument("--limit", type=int, default=40, help="evaluate the first N windows of each text")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--variants", nargs="+", help=f"of: {', '.join(VARIANTS)} (default: the main ones)")
    args = parser.parse_args()
    args.evaluation = args.evaluation or ["demo"]
    set_logging("warning")
    rows: list[Row] = []
    out, session = console(), None
    for model in args.model or DEMO:
        session = None
        for setting in args.settings:
            weight_only = SETTINGS[setting][1] == 16
            labels = args.variants or (*MAIN, *(COMPOSED if weight_only else ()))
            plans = {label: config_for(args, model, setting, label) for label in labels}
            shifted = [p for p in plans.values() if p.learning and p.learning.transform.shift]
            # Shifts give linears biases, which is decided when the model is opened.
            session = Session((shifted or list(plans.values()))[0])
            with ProgressBars(out) as bars:
                found = session.run_all(
                    list(plans.values()), lambda m, s=setting, n=Path(model).name: bars.for_method(f"{n} {s} {m}")
                )
            rows += [Row(model, setting, label, r) for label, r in zip(plans, found, strict=True)]
            write(args, rows, session)
    out.print(f"benchmarks/results/{args.name}.md")


def write(args: argparse.Namespace, rows: list[Row], session: Session) -> None:
    """The tables as markdown, and what they were measured on."""
    versions = ", ".join(f"{k} {v}" for k, v in env.versions().items())
    shown = [Path(source).name for source in (args.calibration, *args.evaluation)]
    steps = args.epochs * args.nsamples
    text = [
        f"# {args.name}: learned methods",
        "",
        f"Calibration {shown[0]}, {args.nsamples} windows of {args.seqlen} tokens, seed 0; {args.epochs} epochs of batches "
        f"of one window ({steps} steps a block), let_lr {args.let_lr:g}, lwc_lr {args.lwc_lr:g}, sf {args.sf:g}, alpha 0.5, "
        "--aug_loss at 2 bits; rounding to nearest on the learned grid unless the name says otherwise. affinequant: "
        "matrices behind norms with A16, matrices of heads otherwise. abq at 2 bits has five levels, stored in 3 bits. "
        f"Perplexity: the first {args.limit} windows of {args.seqlen} tokens, on {', '.join(shown[1:])}; the interval is "
        f"that of the ratio. {session.device.type}, {env.describe(session.device)['threads']} threads. {versions}.",
        "",
        "| setting | method | mean perplexity ratio | mean KL divergence | models below rtn | below omniquant |",
        "|---" * 6 + "|",
        *mean_rows(rows),
        "",
        "| model | setting | method | bits per weight | data | ppl before | ppl after | ratio, 95% interval "
        "| KL divergence | loss, end / start | learn s |",
        "|---" * 11 + "|",
        *quality_rows(rows),
        "",
    ]
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / f"{args.name}.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
