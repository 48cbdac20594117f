"""Learn clips and transforms that make weights, and activations if asked, easy to quantize; then round and measure.

The command line of the users of OmniQuant, AffineQuant and ABQ-LLM, for every family. Every finished block is on
disk: the same command continues a run that was interrupted, with identical bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from quant.cli.arguments import build_parser, flag_mistakes, place_mistakes, source_mistakes, values_of
from quant.cli.errors import exit_code_of, set_logging
from quant.cli.flags import LEARNER, PARTS, SEAMS, split_words
from quant.cli.options import method_mistakes, options_of
from quant.core.errors import InputError

EXAMPLES = """examples:
  # the embedded demo, 3-bit weights, learnable clipping: no network, a few minutes on a laptop
  python main.py --model models/demo/llama --calib_dataset demo --eval-datasets demo --eval_ppl --seqlen 256 \\
      --nsamples 32 --wbits 3 --lwc --epochs 5

  # OmniQuant, weights and activations in 4 bits
  python main.py --model meta-llama/Llama-2-7b-hf --wbits 4 --abits 4 --lwc --let --aug_loss --alpha 0.75 \\
      --epochs 20 --eval_ppl

  # AffineQuant, 2-bit weights in groups of 64, a matrix behind every norm
  python main.py --model facebook/opt-125m --wbits 2 --abits 16 --group_size 64 --lwc --let --use_ln_matrix \\
      --sf 0.1 --epochs 40 --aug_loss --eval_ppl

  # ABQ-LLM at 2 bits (five levels) with 8-bit activations; then QuantEase instead of rounding to nearest
  python main.py --model huggyllama/llama-7b --method abq --wbits 2 --abits 8 --lwc --let --solver quantease --eval_ppl

  # evaluate what another run learned
  python main.py --model facebook/opt-125m --wbits 4 --lwc --let --epochs 0 --resume ../log/RUN --eval_ppl

Exit codes: 0 done, 2 bad arguments or unusable input, 1 a failure after work began, 130 interrupted.
"""
WIDEST_BALANCED = 7  # bits: a code is a byte, which 2^8 + 1 levels do not fit


def parser() -> argparse.ArgumentParser:
    """Flags of the originals keep name, meaning and default."""
    return build_parser(LEARNER, __doc__, EXAMPLES)


def mistakes(args: argparse.Namespace) -> list[str]:
    """Everything that can be said to be wrong before a file is opened."""
    lines = flag_mistakes(args, LEARNER)
    lines += [line for wrong, line in (*grid_rules(args), *learning_rules(args), *file_rules(args)) if wrong]
    return lines + method_mistakes(args, [args.solver]) + source_mistakes(args.corpora, args.calib_dataset)


def grid_rules(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What flags of weights and activations ask of each other, as (whether it is broken, what to say)."""
    yield args.a_symmetric and args.abits == 16, "--a_symmetric is of activations: give --abits below 16"
    yield args.real_quant and 8 < args.abits < 16, f"--real_quant: no kernel takes activations of {args.abits} bits"
    yield args.real_quant and args.wbits == 16, "--real_quant packs quantized weights: give --wbits 1 to 8"
    yield (
        args.bit_balance == "on" and args.wbits > WIDEST_BALANCED,
        f"--bit-balance on: give --wbits 1 to {WIDEST_BALANCED} (2^bits + 1 levels have to fit in a byte)",
    )
    yield args.lwc and args.wbits == 16, "--lwc clips quantized weights: give --wbits 1 to 8, or drop --lwc"
    yield (
        args.let and min(args.wbits, args.abits, args.kvbits) == 16,
        "--let makes weights and activations easy to quantize: give one of --wbits, --abits, --kvbits below 16",
    )


def learning_rules(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """The same of the flags of learning."""
    yield (
        args.epochs > 0 and not (args.lwc or args.let),
        f"--epochs {args.epochs} with nothing to learn: give --lwc, --let or both, or --epochs 0",
    )
    yield (
        args.resume is not None and not (args.lwc or args.let),
        "--resume needs the --lwc and --let flags of the run that learned the parameters",
    )
    yield (args.use_matrix or args.use_ln_matrix) and not args.let, "--use_matrix and --use_ln_matrix need --let"
    yield args.let_seams is not None and not args.let, "--let-seams needs --let"
    yield args.without is not None and args.method != "abq", "--without leaves out parts of abq: give --method abq"
    for part in args.left_out:
        yield part not in PARTS, f"--without {part}: use {', '.join(PARTS)}"
    for seam in args.seams:
        yield seam not in SEAMS, f"--let-seams {seam}: use {', '.join(SEAMS)}"
    yield args.act_scales is not None and not args.let, "--act-scales only matters with --let"
    yield args.act_shifts is not None and args.act_scales is None, "--act-shifts needs --act-scales"


def file_rules(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """The same of what is written."""
    held = args.format == "bitplane" or (args.real_quant and args.format is None)
    yield (
        args.use_ln_matrix and args.save_dir is not None and not held,
        f"--use_ln_matrix leaves a matrix behind every norm, which a {args.format or 'dequantized'} checkpoint cannot "
        "hold: use --format bitplane, or drop --save_dir (the run directory keeps everything)",
    )
    yield (
        args.format is not None and args.save_dir is None and not args.dry_run,
        f"--format {args.format} is of a checkpoint: give --save_dir",
    )


def resolve(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags."""
    implied = "affinequant" if args.use_matrix or args.use_ln_matrix else "omniquant"
    args.method = args.method or implied
    if args.abits is None:
        args.abits = 4 if args.method == "affinequant" else 16
    args.kvbits = args.abits if args.kvbits is None else args.kvbits
    args.left_out, args.seams = split_words(args.without), split_words(args.let_seams)
    args.corpora = split_words(args.eval_datasets) if args.eval_ppl else ()


def learning_of(args: argparse.Namespace) -> Any:
    """What is learned, by the method's recipe; None if nothing is."""
    from quant.learn import recipes
    from quant.learn.config import Learning, TransformSpec

    if not (args.lwc or args.let):
        return None
    bits = min(args.abits, args.kvbits)
    transform = TransformSpec(**values_of(args, LEARNER, "transform"), shift=bool(args.seams) and bits < 16)
    learning = Learning(transform=transform, **values_of(args, LEARNER, "learning"))
    return replace(recipes()[args.method](learning, args.wbits, bits), **dict.fromkeys(args.left_out, False))


def run_config(args: argparse.Namespace) -> Any:
    """The RunConfig of these flags."""
    from quant.blocks.fake_quant import ActSpec
    from quant.learn.abq import balanced_levels
    from quant.run.choice import in_packed_format
    from quant.run.config import RunConfig

    learning = learning_of(args)
    balance = args.bit_balance if args.method == "abq" or args.bit_balance == "on" else "off"
    method = args.method if learning is not None else "rtn"
    given = values_of(args, LEARNER) | {
        "method": method
        if args.solver == "rtn"
        else f"{method}+{args.solver}"
        if learning is not None
        else args.solver,
        "symmetric": args.symmetric or args.disable_zero_point,
        "levels": balanced_levels(args.wbits, balance),
        "learning": learning,
        "act": ActSpec(**values_of(args, LEARNER, "act")),
        "options": options_of(args, args.solver),
        "eval_datasets": args.corpora,
        "dtype": dtype_of(args),
    }
    config = RunConfig(**given)
    packs = args.real_quant and args.format is None and args.save_dir is not None
    return in_packed_format(config) if packs else config


def dtype_of(args: argparse.Namespace) -> str:
    """The arithmetic's dtype; on a GPU bfloat16, or float32 with --deactive_amp, unless --dtype says otherwise."""
    from quant.core import env

    if args.dtype == "auto" and env.pick_device(args.device).type == "cuda":
        return "float32" if args.deactive_amp else "bfloat16"
    dtype: str = args.dtype
    return dtype


def config_from(words: list[str]) -> Any:
    """The RunConfig of a command given as words, for sweeps. Raises InputError for what is wrong with it."""
    args = parser().parse_args(words)
    resolve(args)
    if lines := mistakes(args):
        raise InputError(*lines)
    return run_config(args)


def main() -> None:
    """Parse, check, run."""
    args = parser().parse_args()
    set_logging(args.log_level)
    if args.list:
        from quant.cli.listing import show_list

        show_list()
        return
    resolve(args)
    if lines := mistakes(args) + place_mistakes(args):
        raise InputError(*lines)
    from quant.cli.console import console as make_console
    from quant.cli.plan import show_plan

    console = make_console()
    for given, notice in (
        (args.net, "--net is not needed: the family comes from the model's configuration"),
        (args.multigpu, "--multigpu: blocks pass through one device; more are not used"),
        (not args.eval_ppl and not args.tasks, "no evaluation: give --eval_ppl for perplexity, --tasks for accuracy"),
    ):
        if given:
            console.print(f"note: {notice}", highlight=False)
    config = run_config(args)
    if args.dry_run:
        show_plan([config], console)
    else:
        run(args, config, console)


def run(args: argparse.Namespace, config: Any, console: Any) -> None:
    """Run, and show what came of it."""
    from quant.cli import tables
    from quant.cli.console import ProgressBars
    from quant.export.runtimes import loadability
    from quant.run.session import Session

    session = Session(config)
    if config.save is not None and config.quantizes:
        session.check_export(config)
        console.print(tables.loadability_table(config.format, loadability(config.format, session.content(config))))
    with ProgressBars(console) as bars:
        results = session.run(config, bars.for_method(config.method))
    weights = f"W{args.wbits}A{args.abits}" + (f"KV{args.kvbits}" if args.kvbits != args.abits else "")
    group = f", groups of {args.group_size}" if config.group_size > 0 else ""
    data = f"calibration {args.calib_dataset}, {args.nsamples} x {session.seqlen} tokens, seed {args.seed}"
    title = f"{args.model}: {weights}{group}; {data}"
    tables.show_finished(args, title, [results], None, args.save_dir, console)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
