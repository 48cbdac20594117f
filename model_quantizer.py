"""Quantize the weights of a language model after training, block by block, and measure what it cost.

The command line of QuantEase's users. Every finished block is on disk: the same command continues a run that
was interrupted, with identical bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LAYERS = "layers.json"  # what --compare-layers leaves in --run-dir
EXAMPLES = """examples:
  # the embedded demo: no network, a minute on a laptop; one table compares the methods
  python model_quantizer.py --model models/demo/llama --dataset demo --eval-datasets demo \\
      --wbits 3 --quantization-method rtn,gptq,quantease --nsamples 64 --seqlen 256

  # as in the QuantEase paper
  python model_quantizer.py --model facebook/opt-1.3b --dataset c4 --wbits 3 --num-iter 30 \\
      --quantization-method quantease --nsamples 128 --true-sequential --save out

  # 4 bits, groups of 128, on your own text, no network
  python model_quantizer.py --model ./my-llama --dataset notes.txt --eval-datasets notes.txt,more.jsonl \\
      --wbits 4 --group-size 128 --quantization-method gptq --act-order

  # a checkpoint for vLLM or GPTQModel; refused at once if they could not load it
  python model_quantizer.py --model ./my-llama --dataset notes.txt --wbits 4 --group-size 128 --sym \\
      --quantization-method gptq_quantease --save my-llama-w4 --format gptq --target vllm

  # what would it take? nothing is run
  python model_quantizer.py --model meta-llama/Llama-2-7b-hf --wbits 3 --dry-run

Exit codes: 0 done, 2 bad arguments or unusable input, 1 a failure after work began, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """Flags of the original keep name, meaning and default (except that calibration on C4 uses its train split)."""
    from quant.cli.flags import (
        DEFAULT_CACHE,
        SOURCES,
        add_data_flags,
        add_machine_flags,
        add_result_flags,
        solver_flags,
    )
    from quant.cli.parser import Parser

    p = Parser(
        prog="model_quantizer.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    g = p.add_argument_group("what is quantized, and how")
    g.add_argument("--model", metavar="ID|DIR", help="hub id or local directory; the family comes from its config")
    g.add_argument(
        "--quantization-method",
        default="quantease",
        metavar="NAME[,NAME]",
        help="rtn, gptq, quantease, gptq_quantease, spqr, or several with commas (default: quantease)",
    )
    g.add_argument(
        "--wbits", type=int, default=16, help="bits of a weight, 1 to 8; 16 evaluates the base model (default: 16)"
    )
    g.add_argument(
        "--groupsize",
        "--group-size",
        type=int,
        default=-1,
        metavar="N",
        help="columns that share a scale; -1: one scale a row (default: -1)",
    )
    g.add_argument("--sym", action="store_true", help="symmetric grid: zero point fixed at 2^(bits-1)")
    g.add_argument(
        "--range",
        choices=("minmax", "mse"),
        default="minmax",
        help="grid range: min-max, or the shrink with the least error weighted by the Gram diagonal",
    )
    g.add_argument(
        "--preset",
        choices=("best",),
        help="best: --range mse --search-grid --refit-grid, what measured best with quantease at 2 to 4 bits",
    )
    g.add_argument("--num-layers-to-quantize", type=int, default=1000, metavar="N", help="only the first N blocks")
    g.add_argument(
        "--true-sequential",
        action="store_true",
        help="linears of a block in order of execution, each seeing what is quantized already",
    )
    g = p.add_argument_group("options of the methods")
    option = solver_flags(g)
    option(
        "--num-iter", type=int, default=30, help="quantease, gptq_quantease: coordinate-descent sweeps (default: 30)"
    )
    option(
        "--act-order", action="store_true", help="columns by decreasing Gram diagonal; groups are formed in that order"
    )
    option(
        "--group-aware",
        action="store_true",
        help="gptq: act-order among and inside groups, which keeps column i in group i // group size",
    )
    option(
        "--search-grid", action="store_true", help="quantease: scales by the lowest end of short descents, row by row"
    )
    option("--refit-grid", action="store_true", help="quantease: scales and zero points in closed form between sweeps")
    option("--static-groups", action="store_true", help="group grids from the original weights, before act-order")
    option(
        "--percdamp", type=float, default=0.01, help="gptq: damping, share of the mean Gram diagonal (default: 0.01)"
    )
    option(
        "--auto-damp", action="store_true", help="gptq: raise the damping stepwise where the Gram matrix is singular"
    )
    option(
        "--outlier",
        type=float,
        default=0.0,
        metavar="X",
        help="quantease: share of the weights kept in 16 bits (0.01); spqr: relative threshold (0.2; smaller keeps more)",
    )
    option("--alpha", type=float, default=1.0, help="quantease: multiplier of the outliers' gradient step")
    option("--structure-outlier", action="store_true", help="quantease: whole columns as outliers")
    option("--simplified-outliers", action="store_true", help="spqr: outliers do not leave the range of their group")
    g.add_argument(
        "--solver-option", action="append", default=[], metavar="KEY=VALUE", help="any option of the method (--list)"
    )
    g = add_data_flags(p, seed=0)
    g.add_argument("--dataset", default="c4", help=f"{SOURCES} (default: c4)")
    g.add_argument("--limit", type=int, metavar="N", help="evaluate the first N windows and items only")
    add_machine_flags(p, DEFAULT_CACHE)
    g = add_result_flags(p, "runs/")
    g.add_argument("--save", type=Path, metavar="DIR", help="write the quantized checkpoint and results.json here")
    g.add_argument(
        "--compare-layers",
        action="store_true",
        help="only compare: every method solves every linear from one set of statistics; one table",
    )
    return p  # fmt: skip


def mistakes(args: argparse.Namespace) -> list[str]:
    """Everything that can be said to be wrong before a file is opened."""
    from data.corpora import CALIBRATION, KNOWN, check_source
    from quant.cli.flags import method_mistakes
    from quant.core.errors import InputError

    found: list[str] = []

    def check(bad: bool, message: str) -> None:
        if bad:
            found.append(message)

    check(not args.model, "--model is missing: a hub id or a local directory (models/demo/llama is one)")
    check(args.wbits not in (*range(1, 9), 16), f"--wbits {args.wbits}: use 1 to 8, or 16 for the base model")
    check(args.groupsize != -1 and args.groupsize < 1, f"--groupsize {args.groupsize}: use a positive number or -1")
    check(
        args.wbits == 1 and args.sym, "--wbits 1 --sym: a symmetric grid of one bit has no positive level; drop --sym"
    )
    for name in ("nsamples", "num_iter", "num_layers_to_quantize", "calib_batch"):
        value = getattr(args, name)
        check(value < 1, f"--{name.replace('_', '-')} {value}: use 1 or more")
    check(args.seqlen is not None and args.seqlen < 2, f"--seqlen {args.seqlen}: use 2 or more")
    check(args.limit is not None and args.limit < 1, f"--limit {args.limit}: use 1 or more")
    check(not 0 < args.percdamp <= 1, f"--percdamp {args.percdamp:g}: use a number above 0, at most 1")
    check(not 0 <= args.outlier < float("inf"), f"--outlier {args.outlier:g}: use 0 or a positive number")
    check(not 0 < args.alpha <= 2, f"--alpha {args.alpha:g}: use a number above 0, at most 2")
    check(
        args.outlier > 0 and {"quantease", "spqr"} <= set(args.methods),
        "--outlier is a share of the weights for quantease and a threshold for spqr: run them one by one",
    )
    check(
        args.outlier > 0 and not {"quantease", "spqr"} & set(args.methods),
        "--outlier works with quantease and spqr only",
    )
    check(
        args.outlier >= 1 and "quantease" in args.methods,
        f"--outlier {args.outlier:g}: a share of the weights, below 1",
    )
    check(args.structure_outlier and args.outlier <= 0, "--structure-outlier needs --outlier, the share of the columns")
    check(args.act_order and args.group_aware, "--act-order and --group-aware are two orders: give one of them")
    check(bool(args.preset) and "quantease" not in args.methods, f"--preset {args.preset} is for quantease")
    check(args.compare_layers and args.wbits == 16, "--compare-layers needs --wbits 1 to 8")
    check(
        args.compare_layers and args.true_sequential,
        "--compare-layers solves all linears of a block from one pass of full precision: drop --true-sequential",
    )
    check(args.compare_layers and args.save is not None, "--compare-layers only measures: drop --save")
    check(
        args.format is not None and args.save is None and not args.dry_run,
        f"--format {args.format} is of a checkpoint: give --save DIR too",
    )
    check(not args.methods, "--quantization-method names no method: quantease, gptq, ... (--list)")
    for method in args.methods:
        check(args.methods.count(method) > 1, f"--quantization-method: {method} is named twice")
    found += method_mistakes(args, args.methods, "--quantization-method: ")
    sources = [(source, KNOWN) for source in args.corpora]
    for source, known in sources + ([(args.dataset, CALIBRATION)] if args.wbits != 16 else []):
        try:
            check_source(source, known)
        except InputError as error:
            found.append(str(error))
    check(
        args.task_path is not None and not args.task_path.is_dir(), f"--task-path {args.task_path} is not a directory"
    )
    check(args.data_dir is not None and not args.data_dir.is_dir(), f"--data-dir {args.data_dir} is not a directory")
    return found


def run_configs(args: argparse.Namespace) -> list[Any]:
    """One RunConfig for each method."""
    from quant.cli.flags import options_of
    from quant.run.choice import in_packed_format
    from quant.run.config import RunConfig

    several = len(args.methods) > 1
    configs = [
        RunConfig(
            model=args.model,
            dataset=args.dataset,
            seed=args.seed,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            method=method,
            wbits=args.wbits,
            group_size=args.groupsize,
            symmetric=args.sym,
            range=args.range,
            options=options_of(args, method),
            true_sequential=args.true_sequential,
            num_layers=args.num_layers_to_quantize,
            eval_datasets=tuple(args.corpora),
            tasks=tuple(task for task in args.tasks.split(",") if task),
            task_path=args.task_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            full_precision_eval=not args.no_fp_eval,
            packed=args.real_quant,
            data_dir=args.data_dir,
            cache_dir=args.cache_dir,
            device=args.device,
            dtype=args.dtype,
            solver_precision=args.solver_precision,
            activation_store=args.activation_store,
            calib_batch=args.calib_batch,
            run_dir=args.run_dir / method if args.run_dir and several else args.run_dir,
            save=args.save / method if args.save and several else args.save,
            format=args.format or "dequantized",
            target=args.target,
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            deterministic=args.deterministic,
        )
        for method in args.methods
    ]
    packs = args.real_quant and args.format is None and args.wbits != 16 and (args.save is not None or args.dry_run)
    return [in_packed_format(config) for config in configs] if packs else configs


def prepare(args: argparse.Namespace, here: bool = True) -> None:
    """What flags imply. Raises InputError for everything that is wrong with them. here: the run is to be on this machine,
    which must have the model and the device."""
    from quant.cli.flags import place_mistakes
    from quant.core.errors import InputError

    if args.preset == "best":
        args.range, args.search_grid, args.refit_grid = "mse", True, True
    args.methods = [m for m in args.quantization_method.split(",") if m] if args.wbits != 16 else ["quantease"]
    args.corpora = [d for d in args.eval_datasets.split(",") if d]
    if found := mistakes(args) + (place_mistakes(args) if here else []):
        raise InputError(*found)


def config_from(words: list[str]) -> Any:
    """The RunConfig of a command of one method given as words, for sweeps. Raises InputError for what is wrong with it."""
    from quant.core.errors import InputError

    args = parser().parse_args(words)
    prepare(args, here=False)
    if len(args.methods) != 1:
        raise InputError("--quantization-method: a row of a sweep has one method")
    return run_configs(args)[0]


def main() -> None:
    """Parse, check, run."""
    from quant.cli import flags
    from quant.cli.errors import set_logging
    from quant.core.files import check_owned

    args = parser().parse_args()
    set_logging(args.log_level)
    if args.list:
        from quant.cli.listing import show_list

        show_list()
        return
    prepare(args)
    from quant.cli import console as terminal
    from quant.cli import tables

    configs = run_configs(args)
    console = terminal.console()
    if args.wbits != 16:
        for line in flags.unused_options(args, parser(), args.methods):
            console.print(f"note: {line}", highlight=False, soft_wrap=True)
    if args.dry_run:
        from quant.cli.plan import show_plan

        show_plan(configs, console)
        return
    from quant.run.session import Session

    if args.compare_layers and args.run_dir is not None:
        check_owned(args.run_dir / LAYERS)
    session = Session(configs[0])
    for config in configs:
        if config.quantizes:
            session.recipe(config)
            session.check_export(config)
    if args.save and configs[0].quantizes:
        from quant.export.runtimes import loadability

        rows = loadability(configs[0].format, session.content(configs[0]))
        console.print(tables.loadability_table(configs[0].format, rows))
    with terminal.ProgressBars(console) as bars:
        if args.compare_layers:
            records = session.compare_layers(configs, bars.for_method("layers"))
        else:
            finished = session.run_all(configs, bars.for_method)
    if args.compare_layers:
        show_comparison(args, session, records, console)
        return
    bits = f"{args.wbits} bits" + (f", groups of {args.groupsize}" if args.groupsize > 0 else "")
    setting = bits if args.wbits != 16 else "base model"
    data = f"calibration {args.dataset}, {args.nsamples} x {session.seqlen} tokens, seed {args.seed}"
    tables.show_results(f"{args.model}: {setting}; {data}", finished, console, args.compute_quantization_recon_error)
    if not args.no_report:
        tables.show_report(finished, args.run_dir, console)
    if args.save:
        console.print(f"checkpoint: {args.save}", highlight=False, soft_wrap=True)


def show_comparison(args: argparse.Namespace, session: Any, records: list[dict[str, Any]], console: Any) -> None:
    """One row a method; with --compute-quantization-recon-error one a linear; all of it as JSON in --run-dir."""
    from quant.cli import tables
    from quant.core.files import write_owned

    console.print()
    console.print(tables.comparison_table(records, f"{args.model}: {args.wbits} bits, layer by layer, {args.dataset}"))
    if args.compute_quantization_recon_error:
        console.print(tables.linears_table(records))
    if args.run_dir is not None:
        write_owned(args.run_dir, {LAYERS: (json.dumps(records, indent=2) + "\n").encode()})
        console.print(f"  {args.run_dir / LAYERS}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from quant.cli.errors import exit_code_of

    sys.exit(exit_code_of(main))
