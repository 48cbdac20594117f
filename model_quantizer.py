"""Quantize the weights of a language model after training, block by block, and measure what it cost.

The command line of QuantEase's users. Every finished block is on disk: the same command continues a run that
was interrupted, with identical bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from quant.cli.arguments import build_parser, flag_mistakes, place_mistakes, source_mistakes, values_of
from quant.cli.errors import exit_code_of, set_logging
from quant.cli.flags import QUANTIZER, split_words
from quant.cli.options import method_mistakes, options_of, unused_options
from quant.core.errors import InputError

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
    return build_parser(QUANTIZER, __doc__, EXAMPLES)


def mistakes(args: argparse.Namespace) -> list[str]:
    """Everything that can be said to be wrong before a file is opened."""
    lines = flag_mistakes(args, QUANTIZER)
    lines += [line for wrong, line in (*solver_rules(args), *run_rules(args)) if wrong]
    lines += method_mistakes(args, args.methods, "--quantization-method: ")
    return lines + source_mistakes(args.corpora, args.dataset if args.wbits != 16 else None)


def solver_rules(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What flags of the methods ask of each other, as (whether it is broken, what to say)."""
    methods = set(args.methods)
    yield (
        args.wbits == 1 and args.sym,
        "--wbits 1 --sym: a symmetric grid of one bit has no positive level; drop --sym",
    )
    yield (
        args.outlier > 0 and {"quantease", "spqr"} <= methods,
        "--outlier is a share of the weights for quantease and a threshold for spqr: run them one by one",
    )
    yield args.outlier > 0 and not {"quantease", "spqr"} & methods, "--outlier works with quantease and spqr only"
    yield (
        args.outlier >= 1 and "quantease" in methods,
        f"--outlier {args.outlier:g}: a share of the weights, below 1",
    )
    yield args.structure_outlier and args.outlier <= 0, "--structure-outlier needs --outlier, the share of the columns"
    yield args.act_order and args.group_aware, "--act-order and --group-aware are two orders: give one of them"
    yield bool(args.preset) and "quantease" not in methods, f"--preset {args.preset} is for quantease"
    yield not methods, "--quantization-method names no method: quantease, gptq, ... (--list)"
    for method in args.methods:
        yield args.methods.count(method) > 1, f"--quantization-method: {method} is named twice"


def run_rules(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """The same of the flags of the run."""
    yield args.compare_layers and args.wbits == 16, "--compare-layers needs --wbits 1 to 8"
    yield (
        args.compare_layers and args.true_sequential,
        "--compare-layers solves all linears of a block from one pass of full precision: drop --true-sequential",
    )
    yield args.compare_layers and args.save is not None, "--compare-layers only measures: drop --save"
    yield (
        args.format is not None and args.save is None and not args.dry_run,
        f"--format {args.format} is of a checkpoint: give --save DIR too",
    )


def run_configs(args: argparse.Namespace) -> list[Any]:
    """One RunConfig for each method."""
    from quant.run.choice import in_packed_format
    from quant.run.config import RunConfig

    several, given = len(args.methods) > 1, values_of(args, QUANTIZER)
    configs = []
    for method in args.methods:
        own = {"method": method, "options": options_of(args, method)}
        own |= {name: given[name] / method for name in ("run_dir", "save") if given[name] and several}
        configs.append(RunConfig(**(given | own)))
    packs = args.real_quant and args.format is None and args.wbits != 16 and (args.save is not None or args.dry_run)
    return [in_packed_format(config) for config in configs] if packs else configs


def prepare(args: argparse.Namespace, here: bool = True) -> None:
    """What flags imply. Raises InputError for everything that is wrong with them. here: the run is to be on this machine,
    which must have the model and the device."""
    if args.preset == "best":
        args.range, args.search_grid, args.refit_grid = "mse", True, True
    args.methods = list(split_words(args.quantization_method)) if args.wbits != 16 else ["quantease"]
    args.corpora = split_words(args.eval_datasets)
    if lines := mistakes(args) + (place_mistakes(args) if here else []):
        raise InputError(*lines)


def config_from(words: list[str]) -> Any:
    """The RunConfig of a command of one method given as words, for sweeps. Raises InputError for what is wrong with it."""
    args = parser().parse_args(words)
    prepare(args, here=False)
    if len(args.methods) != 1:
        raise InputError("--quantization-method: a row of a sweep has one method")
    return run_configs(args)[0]


def main() -> None:
    """Parse, check, run."""
    args = parser().parse_args()
    set_logging(args.log_level)
    if args.list:
        from quant.cli.listing import show_list

        show_list()
        return
    prepare(args)
    from quant.cli.console import console as make_console
    from quant.cli.plan import show_plan

    configs, console = run_configs(args), make_console()
    for line in unused_options(args, parser(), args.methods) if args.wbits != 16 else []:
        console.print(f"note: {line}", highlight=False, soft_wrap=True)
    if args.dry_run:
        show_plan(configs, console)
    else:
        run(args, configs, console)


def run(args: argparse.Namespace, configs: list[Any], console: Any) -> None:
    """Run all methods, and show what came of them."""
    from quant.cli import tables
    from quant.cli.console import ProgressBars
    from quant.core.files import check_owned
    from quant.export.runtimes import loadability
    from quant.run.session import Session

    if args.compare_layers and args.run_dir is not None:
        check_owned(args.run_dir / LAYERS)
    session = Session(configs[0])
    for config in configs:
        if config.quantizes:
            session.recipe(config)
            session.check_export(config)
    if args.save and configs[0].quantizes:
        rows = loadability(configs[0].format, session.content(configs[0]))
        console.print(tables.loadability_table(configs[0].format, rows))
    with ProgressBars(console) as bars:
        if args.compare_layers:
            records = session.compare_layers(configs, bars.for_method("layers"))
        else:
            finished = session.run_all(configs, bars.for_method)
    if args.compare_layers:
        show_comparison(args, records, console)
        return
    bits = f"{args.wbits} bits" + (f", groups of {args.groupsize}" if args.groupsize > 0 else "")
    setting = bits if args.wbits != 16 else "base model"
    data = f"calibration {args.dataset}, {args.nsamples} x {session.seqlen} tokens, seed {args.seed}"
    tables.show_finished(args, f"{args.model}: {setting}; {data}", finished, args.run_dir, args.save, console)


def show_comparison(args: argparse.Namespace, records: list[dict[str, Any]], console: Any) -> None:
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
    sys.exit(exit_code_of(main))
