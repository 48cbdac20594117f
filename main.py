"""Learn clips and transforms that make weights, and activations if asked, easy to quantize; then round and measure.

The command line of the users of OmniQuant, AffineQuant and ABQ-LLM, for every family. Every finished block is on
disk: the same command continues a run that was interrupted, with identical bits.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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
SEAMS = ("norm", "vo", "qk", "mul")
PARTS = ("compensation", "distribution", "attention")  # of abq: fields of Learning
WIDEST_BALANCED = 7  # bits: a code is a byte, which 2^8 + 1 levels do not fit


def parser() -> argparse.ArgumentParser:
    """Flags of the originals keep name, meaning and default."""
    from quant.cli.flags import SOURCES, add_data_flags, add_machine_flags, add_result_flags, solver_flags
    from quant.cli.parser import Parser

    p = Parser(
        prog="main.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("what is quantized")
    g.add_argument("--model", metavar="ID|DIR", help="hub id or local directory; the family comes from its config")
    g.add_argument("--wbits", type=int, default=4, help="bits of a weight, 1 to 8, or 16 (default: 4)")
    g.add_argument("--abits", type=int, help="bits of an activation, 2 to 15, or 16 (default: 16; affinequant: 4)")
    g.add_argument("--kvbits", type=int, help="bits of keys and values (default: as --abits)")
    g.add_argument("--group_size", type=int, metavar="N", help="columns that share a scale (default: a scale a row)")
    g.add_argument("--symmetric", action="store_true", help="symmetric weight grid")
    g.add_argument("--disable_zero_point", action="store_true", help="the same: no zero points for weights")
    g.add_argument(
        "--a_dynamic_method",
        default="per_token",
        choices=("per_token", "per_tensor", "static"),
        help="range of activations: every token's, every call's, or fixed by calibration once a block is learned "
        "(it trains with every call's, so the loss is not that of what is deployed) (default: per_token)",
    )
    g.add_argument(
        "--a_symmetric", action="store_true", help="symmetric range of the linears' inputs, as W8A8 runtimes compute"
    )
    g.add_argument("--w_dynamic_method", default="per_channel", choices=("per_channel",))
    g.add_argument(
        "--bit-balance",
        default="auto",
        choices=("auto", "on", "off"),
        help="2^bits + 1 levels; auto: with --method abq at 1 and 2 bits (five levels are stored in 3 bits)",
    )
    g = p.add_argument_group("what is learned")
    g.add_argument(
        "--method",
        choices=("omniquant", "affinequant", "abq"),
        help="default: affinequant with --use_matrix or --use_ln_matrix, else omniquant",
    )
    g.add_argument("--lwc", action="store_true", help="learnable weight clipping")
    g.add_argument("--let", action="store_true", help="learnable equivalent transforms")
    g.add_argument("--use_matrix", action="store_true", help="affine matrices for each head on q-k and v-o")
    g.add_argument("--use_ln_matrix", action="store_true", help="a dense matrix behind every norm, kept in the model")
    g.add_argument(
        "--sf",
        "--stability_factor",
        type=float,
        default=1.0,
        metavar="X",
        help="factor of matrix entries off the diagonal, in (0, 1] (default: 1.0)",
    )
    g.add_argument(
        "--alpha", type=float, default=0.5, help="SmoothQuant's exponent of the starting scale (default: 0.5)"
    )
    g.add_argument("--without", metavar="A,B", help=f"of {', '.join(PARTS)}: parts of abq that are left out")
    g.add_argument("--let-seams", metavar="A,B", help=f"of {', '.join(SEAMS)} (default: the method's)")
    g.add_argument(
        "--let-rope",
        default="tied",
        choices=("tied", "untied"),
        help="q/k scales that commute with rotary embeddings; untied: as published, not an equivalence",
    )
    g.add_argument("--inverse-dtype", default="float32", choices=("float32", "float64"), help="of matrix inverses")
    g.add_argument("--act-scales", type=Path, metavar="FILE", help="of generate_act_scale_shift.py (default: measured)")
    g.add_argument("--act-shifts", type=Path, metavar="FILE", help="of generate_act_scale_shift.py (default: measured)")
    g = p.add_argument_group("how it is learned")
    g.add_argument("--epochs", type=int, default=10, help="0: only what --resume learned (default: 10)")
    g.add_argument("--batch_size", type=int, default=1, help="windows a step (default: 1)")
    g.add_argument("--let_lr", type=float, default=5e-3, help="rate of transforms (default: 5e-3)")
    g.add_argument("--lwc_lr", type=float, default=1e-2, help="rate of clips (default: 1e-2)")
    g.add_argument("--wd", type=float, default=0.0, help="weight decay (default: 0)")
    g.add_argument("--aug_loss", action="store_true", help="also match the full-precision block on quantized inputs")
    g.add_argument(
        "--patience", type=int, default=0, metavar="N", help="stop a block after N epochs without a better loss"
    )
    g.add_argument(
        "--deactive_amp",
        action="store_true",
        help="train and evaluate in float32 on a GPU too, unless --dtype says otherwise (default there: bfloat16)",
    )
    g.add_argument("--resume", type=Path, metavar="DIR", help="start from the learned parameters of that run directory")
    g = p.add_argument_group("how it is rounded")
    g.add_argument(
        "--solver", default="rtn", metavar="NAME", help="rtn, gptq, quantease, ... on the learned grid (default: rtn)"
    )
    g.add_argument("--true-sequential", action="store_true", help="for solvers: linears in order of execution")
    option = solver_flags(g)
    option("--num-iter", type=int, default=30, help="quantease: sweeps (default: 30)")
    option("--percdamp", type=float, default=0.01, help="gptq: damping (default: 0.01)")
    g.add_argument(
        "--solver-option", action="append", default=[], metavar="KEY=VALUE", help="any option of the solver (--list)"
    )
    g = add_data_flags(p, seed=2)
    p.set_defaults(num_fewshot=0)
    g.add_argument("--calib_dataset", "--dataset", default="wikitext2", help=f"{SOURCES} (default: wikitext2)")
    g.add_argument("--eval_ppl", action="store_true", help="evaluate perplexity on --eval-datasets")
    g.add_argument(
        "--limit",
        type=int,
        default=-1,
        metavar="N",
        help="evaluate the first N windows and items only (default: -1, all)",
    )
    g = add_machine_flags(p, Path("cache"), "bfloat16 on a GPU, whatever the checkpoint's; float32 on a CPU")
    g.add_argument(
        "--attn_implementation",
        default="eager",
        choices=("eager", "sdpa"),
        help="of transformers: eager, sdpa (faster) (default: eager)",
    )
    g.add_argument("--multigpu", action="store_true", help="accepted; blocks pass one device at a time")
    g.add_argument("--net", help="accepted; the family comes from the configuration")
    g = add_result_flags(p, "--output_dir")
    g.add_argument(
        "--output_dir", type=Path, default=Path("../log/"), help="where run directories are made (default: ../log/)"
    )
    g.add_argument("--save_dir", type=Path, metavar="DIR", help="write the quantized checkpoint and results.json here")
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

    def fails(action: Any, *given: Any) -> None:
        try:
            action(*given)
        except InputError as error:
            found.append(str(error))

    check(not args.model, "--model is missing: a hub id or a local directory (models/demo/llama is one)")
    check(args.wbits not in (*range(1, 9), 16), f"--wbits {args.wbits}: use 1 to 8, or 16 to leave weights alone")
    for name in ("abits", "kvbits"):
        value = getattr(args, name)
        check(not 2 <= value <= 16, f"--{name} {value}: use 2 to 15, or 16 to leave activations alone")
    check(args.a_symmetric and args.abits == 16, "--a_symmetric is of activations: give --abits below 16")
    check(args.real_quant and 8 < args.abits < 16, f"--real_quant: no kernel takes activations of {args.abits} bits")
    check(args.real_quant and args.wbits == 16, "--real_quant packs quantized weights: give --wbits 1 to 8")
    check(
        args.bit_balance == "on" and args.wbits > WIDEST_BALANCED,
        f"--bit-balance on: give --wbits 1 to {WIDEST_BALANCED} (2^bits + 1 levels have to fit in a byte)",
    )
    check(
        args.group_size is not None and args.group_size < 1 and args.group_size != -1,
        f"--group_size {args.group_size}: use a positive number, or leave it out",
    )
    for name in ("nsamples", "batch_size", "calib_batch", "num_iter"):
        check(getattr(args, name) < 1, f"--{name} {getattr(args, name)}: use 1 or more")
    for name in ("let_lr", "lwc_lr"):
        check(not 0 < getattr(args, name) < math.inf, f"--{name} {getattr(args, name):g}: use a positive rate")
    check(not 0 <= args.wd < math.inf, f"--wd {args.wd:g}: use 0 or a positive number")
    check(args.patience < 0, f"--patience {args.patience}: use 1 or more epochs, or 0 to train them all")
    check(args.seqlen is not None and args.seqlen < 2, f"--seqlen {args.seqlen}: use 2 or more")
    check(args.limit == 0 or args.limit < -1, f"--limit {args.limit}: use 1 or more, or -1 for all")
    check(args.epochs < 0, f"--epochs {args.epochs}: use 0 or more")
    check(
        args.epochs > 0 and not (args.lwc or args.let),
        f"--epochs {args.epochs} with nothing to learn: give --lwc, --let or both, or --epochs 0",
    )
    check(args.lwc and args.wbits == 16, "--lwc clips quantized weights: give --wbits 1 to 8, or drop --lwc")
    check(
        args.let and min(args.wbits, args.abits, args.kvbits) == 16,
        "--let makes weights and activations easy to quantize: give one of --wbits, --abits, --kvbits below 16",
    )
    check(
        args.resume is not None and not (args.lwc or args.let),
        "--resume needs the --lwc and --let flags of the run that learned the parameters",
    )
    check((args.use_matrix or args.use_ln_matrix) and not args.let, "--use_matrix and --use_ln_matrix need --let")
    check(
        args.use_ln_matrix
        and args.save_dir is not None
        and args.format != "bitplane"
        and not (args.real_quant and args.format is None),
        f"--use_ln_matrix leaves a matrix behind every norm, which a {args.format or 'dequantized'} checkpoint cannot "
        "hold: use --format bitplane, or drop --save_dir (the run directory keeps everything)",
    )
    check(not 0 < args.sf <= 1, f"--sf {args.sf:g}: use a number above 0, at most 1")
    check(not 0 <= args.alpha <= 1, f"--alpha {args.alpha:g}: use a number from 0 to 1")
    check(args.let_seams is not None and not args.let, "--let-seams needs --let")
    check(args.without is not None and args.method != "abq", "--without leaves out parts of abq: give --method abq")
    for part in args.left_out:
        check(part not in PARTS, f"--without {part}: use {', '.join(PARTS)}")
    for seam in args.seams:
        check(seam not in SEAMS, f"--let-seams {seam}: use {', '.join(SEAMS)}")
    check(args.act_scales is not None and not args.let, "--act-scales only matters with --let")
    check(args.act_shifts is not None and args.act_scales is None, "--act-shifts needs --act-scales")
    for name in ("act_scales", "act_shifts"):
        path = getattr(args, name)
        check(path is not None and not path.is_file(), f"--{name.replace('_', '-')} {path}: no such file")
    check(
        args.format is not None and args.save_dir is None and not args.dry_run,
        f"--format {args.format} is of a checkpoint: give --save_dir",
    )
    found += method_mistakes(args, [args.solver])
    fails(check_source, args.calib_dataset, CALIBRATION)
    for source in args.corpora:
        fails(check_source, source, KNOWN)
    check(
        args.task_path is not None and not args.task_path.is_dir(), f"--task-path {args.task_path} is not a directory"
    )
    check(args.data_dir is not None and not args.data_dir.is_dir(), f"--data-dir {args.data_dir} is not a directory")
    return found  # fmt: skip


def resolve(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags."""
    implied = "affinequant" if args.use_matrix or args.use_ln_matrix else "omniquant"
    args.method = args.method or implied
    if args.abits is None:
        args.abits = 4 if args.method == "affinequant" else 16
    args.kvbits = args.abits if args.kvbits is None else args.kvbits
    args.left_out = [part for part in (args.without or "").split(",") if part]
    args.seams = [seam for seam in (args.let_seams or "").split(",") if seam]
    args.corpora = [d for d in args.eval_datasets.split(",") if d] if args.eval_ppl else []


def learning_of(args: argparse.Namespace) -> Any:
    """What is learned, by the method's recipe; None if nothing is."""
    from quant.learn import recipes
    from quant.learn.config import Learning, TransformSpec

    if not (args.lwc or args.let):
        return None
    transform = TransformSpec(
        let=args.let,
        kinds=tuple(args.seams),
        matrix=args.use_matrix,
        norm_matrix=args.use_ln_matrix,
        shift=bool(args.seams) and min(args.abits, args.kvbits) < 16,
        alpha=args.alpha,
        tied=args.let_rope == "tied",
        stability=args.sf,
        precise=args.inverse_dtype == "float64",
    )
    asked = Learning(
        transform=transform,
        clip=args.lwc,
        epochs=args.epochs,
        let_lr=args.let_lr,
        lwc_lr=args.lwc_lr,
        weight_decay=args.wd,
        batch=args.batch_size,
        augmented=args.aug_loss,
        patience=args.patience,
    )
    recipe = recipes()[args.method](asked, args.wbits, min(args.abits, args.kvbits))
    return replace(recipe, **dict.fromkeys(args.left_out, False))


def run_config(args: argparse.Namespace) -> Any:
    """The RunConfig of these flags."""
    from quant.blocks.actquant import ActSpec
    from quant.cli.flags import options_of
    from quant.core import env
    from quant.learn.abq import balanced_levels
    from quant.run.choice import in_packed_format
    from quant.run.config import RunConfig

    learning = learning_of(args)
    dtype = args.dtype
    if dtype == "auto" and env.pick_device(args.device).type == "cuda":
        dtype = "float32" if args.deactive_amp else "bfloat16"
    balance = args.bit_balance if args.method == "abq" or args.bit_balance == "on" else "off"
    method = args.method if learning is not None else "rtn"
    config = RunConfig(
        model=args.model,
        dataset=args.calib_dataset,
        seed=args.seed,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        method=method if args.solver == "rtn" else f"{method}+{args.solver}" if learning is not None else args.solver,
        solver=args.solver,
        wbits=args.wbits,
        group_size=args.group_size or -1,
        symmetric=args.symmetric or args.disable_zero_point,
        levels=balanced_levels(args.wbits, balance),
        learning=learning,
        act=ActSpec(args.abits, args.kvbits, args.a_dynamic_method, args.a_symmetric),
        resume=args.resume,
        act_scales=args.act_scales,
        act_shifts=args.act_shifts,
        options=options_of(args, args.solver),
        true_sequential=args.true_sequential,
        eval_datasets=tuple(args.corpora),
        tasks=tuple(task for task in args.tasks.split(",") if task),
        task_path=args.task_path,
        num_fewshot=args.num_fewshot,
        limit=None if args.limit == -1 else args.limit,
        full_precision_eval=not args.no_fp_eval,
        packed=args.real_quant,
        data_dir=args.data_dir,
        cache_dir=args.cache_dir,
        device=args.device,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        solver_precision=args.solver_precision,
        activation_store=args.activation_store,
        calib_batch=args.calib_batch,
        runs=args.output_dir,
        run_dir=args.run_dir,
        save=args.save_dir,
        format=args.format or "dequantized",
        target=args.target,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        deterministic=args.deterministic,
    )
    packs = args.real_quant and args.format is None and args.save_dir is not None
    return in_packed_format(config) if packs else config


def config_from(words: list[str]) -> Any:
    """The RunConfig of a command given as words, for sweeps. Raises InputError for what is wrong with it."""
    from quant.core.errors import InputError

    args = parser().parse_args(words)
    resolve(args)
    if found := mistakes(args):
        raise InputError(*found)
    return run_config(args)


def main() -> None:
    """Parse, check, run."""
    from quant.cli import flags
    from quant.cli.errors import set_logging
    from quant.core.errors import InputError

    args = parser().parse_args()
    set_logging(args.log_level)
    if args.list:
        from quant.cli.listing import show_list

        show_list()
        return
    resolve(args)
    if found := mistakes(args) + flags.place_mistakes(args):
        raise InputError(*found)
    from quant.cli import console as terminal
    from quant.cli import tables

    console = terminal.console()
    for given, notice in (
        (args.net, "--net is not needed: the family comes from the model's configuration"),
        (args.multigpu, "--multigpu: blocks pass through one device; more are not used"),
        (not args.eval_ppl and not args.tasks, "no evaluation: give --eval_ppl for perplexity, --tasks for accuracy"),
    ):
        if given:
            console.print(f"note: {notice}", highlight=False)
    config = run_config(args)
    if args.dry_run:
        from quant.cli.plan import show_plan

        show_plan([config], console)
        return
    from quant.run.session import Session

    session = Session(config)
    if config.save is not None and config.quantizes:
        from quant.export.runtimes import loadability

        session.check_export(config)
        console.print(tables.loadability_table(config.format, loadability(config.format, session.content(config))))
    with terminal.ProgressBars(console) as bars:
        results = session.run(config, bars.for_method(config.method))
    weights = f"W{args.wbits}A{args.abits}" + (f"KV{args.kvbits}" if args.kvbits != args.abits else "")
    group = f", groups of {args.group_size}" if config.group_size > 0 else ""
    data = f"calibration {args.calib_dataset}, {args.nsamples} x {session.seqlen} tokens, seed {args.seed}"
    tables.show_results(
        f"{args.model}: {weights}{group}; {data}", [results], console, args.compute_quantization_recon_error
    )
    if not args.no_report:
        tables.show_report([results], None, console)
    if args.save_dir:
        console.print(f"checkpoint: {args.save_dir}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from quant.cli.errors import exit_code_of

    sys.exit(exit_code_of(main))
