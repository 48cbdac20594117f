"""What flags ask of each other, as (whether it is broken, what to say)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from quant.cli.flags import PARTS, SEAMS, rotations
from quant.core.names import (
    AUTOROUND,
    CORRECTING,
    FULL_BITS,
    LEVEL_GRIDS,
    ONLINE_ROTATIONS,
    ROTATIONS,
    SAMPLED_LABELS,
    SUPER_GRIDS,
    TUNED_METHODS,
    UNPACKED,
)

Rules = Iterator[tuple[bool, str]]
TUNING_OPTIONS = ("iterations", "rate", "grid_rate", "norms", "optimizer", "drop", "last", "recompute", "state")
WIDEST_BALANCED = 7  # bits: a code is a byte, which 2^8 + 1 levels do not fit


def quantizer_rules(args: argparse.Namespace) -> Rules:
    """Those of model_quantizer.py."""
    yield from solver_rules(args)
    yield from correction_rules(args)
    yield from super_grid_rules(args)
    yield from level_grid_rules(args)
    yield from saliency_rules(args)
    yield from run_rules(args)
    yield from tuning_rules(args)
    yield from rotation_rules(args)
    yield from block_rules(args)
    yield from plan_rules(args)


def learner_rules(args: argparse.Namespace) -> Rules:
    """Those of main.py."""
    yield from grid_rules(args)
    yield from correction_rules(args)
    yield from saliency_rules(args)
    yield from block_rules(args)
    yield from plan_rules(args)
    yield from learning_rules(args)
    yield from tuning_rules(args)
    yield from file_rules(args)
    yield from rotation_rules(args)


def solver_rules(args: argparse.Namespace) -> Rules:
    """Of flags of the methods."""
    methods = set(args.methods)
    yield (
        args.wbits == 1 and args.sym,
        "--wbits 1 --sym: a symmetric grid of one bit has no positive level; drop --sym",
    )
    yield (
        args.grid != "integer" and args.sym,
        f"--grid {args.grid} --sym: a symmetric grid has its zero point in the middle; drop one of them",
    )
    yield (
        args.grid != "integer" and "spqr" in methods,
        f"--grid {args.grid}: spqr's scales of two levels have integer zero points; drop --grid {args.grid}, or use another method",
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


def correction_rules(args: argparse.Namespace) -> Rules:
    """Of flags of the corrected target."""
    corrects = args.target_correction > 0
    yield corrects and args.wbits == FULL_BITS, "--target-correction is of what is rounded: give --wbits 1 to 8"
    yield args.residual_correction and not corrects, "--residual-correction: give --target-correction 1 too"
    itself = sorted({*args.methods, getattr(args, "solver", "")} & {*CORRECTING})
    yield (
        (corrects or bool(itself)) and not args.true_sequential,
        f"{', '.join(itself) or '--target-correction'}: several linears of a block would make up for one error, which then grows "
        "from block to block: give --true-sequential",
    )


def saliency_rules(args: argparse.Namespace) -> Rules:
    """Of flags of token weights."""
    yield args.saliency > 0 and args.wbits == FULL_BITS, "--saliency is of what is rounded: give --wbits 1 to 8"
    yield (
        args.saliency == 0 and args.saliency_labels != SAMPLED_LABELS,
        f"--saliency-labels {args.saliency_labels}: give --saliency 1 to 8 too",
    )


def run_rules(args: argparse.Namespace) -> Rules:
    """Of flags of the run."""
    yield (
        args.imatrix is not None and (args.wbits == FULL_BITS or args.compare_layers),
        "--imatrix is of the calibration text of a run that quantizes: give --wbits 1 to 8, and no --compare-layers",
    )
    yield args.imatrix is not None and args.rotate is not None, "--imatrix is of the original model: drop --rotate"
    yield (
        args.imatrix is not None and len(args.methods) > 1,
        "--imatrix is of the original model, whatever the method: give it with one method",
    )
    yield args.avg_bits is not None and args.compare_layers, "--compare-layers compares at one width: drop --avg-bits"
    yield args.compare_layers and args.wbits == FULL_BITS, "--compare-layers needs --wbits 1 to 8"
    yield (
        args.grid != "integer" and args.wbits == FULL_BITS,
        f"--grid {args.grid} is of quantized weights: give --wbits 1 to 8, or drop --grid",
    )
    yield (
        args.compare_layers and args.true_sequential,
        "--compare-layers solves all linears of a block from one pass of full precision: drop --true-sequential",
    )
    yield args.tune is not None and args.compare_layers, "--compare-layers keeps no codes to tune: drop --tune"
    for method in TUNED_METHODS:
        yield args.compare_layers and method in args.methods, f"--compare-layers keeps no codes to tune: drop {method}"
    yield (
        args.compare_layers and args.target_correction > 0,
        "--compare-layers gives every method the original inputs, so that nothing is corrected: drop --target-correction",
    )
    yield (
        args.compare_layers and args.saliency > 0,
        "--compare-layers solves all methods from one set of statistics, in which tokens count alike: drop --saliency",
    )
    yield (
        args.saliency > 0 and args.structure_outlier,
        "--structure-outlier keeps whole columns, --saliency solves rows in parts: drop one of them",
    )
    yield args.compare_layers and args.save is not None, "--compare-layers only measures: drop --save"
    yield (
        args.compare_layers and (args.head_bits or args.embedding_bits) is not None,
        "--compare-layers is of the linears in the blocks: drop --head-bits and --embedding-bits",
    )
    yield args.compare_layers and args.bias_correction, "--compare-layers deploys nothing: drop --bias-correction"
    yield args.compare_layers and args.column_scales, "--compare-layers solves layers as they are: drop --column-scales"
    yield (
        args.format is not None and args.save is None and not args.dry_run,
        f"--format {args.format} is of a checkpoint: give --save DIR too",
    )


def tuning_rules(args: argparse.Namespace) -> Rules:
    """Of flags of what moves after solving."""
    yield args.tune is not None and args.wbits == FULL_BITS, f"--tune {args.tune} moves codes: give --wbits 1 to 8"
    tuned = args.tune is not None or bool(set(args.methods) & set(TUNED_METHODS))
    for name in TUNING_OPTIONS:
        yield (
            not tuned and getattr(args, f"tune_{name}") not in (None, False),
            f"--tune-{name.replace('_', '-')}: give --tune block, window:K or model too",
        )
    yield (
        args.tune == "model" and args.tune_last not in (None, "kl"),
        f"--tune-last {args.tune_last} is of the last block: --tune model is for the model's logits; drop one of them",
    )
    optimizer = args.tune_optimizer or ("sign" if set(args.methods) == {AUTOROUND} else "adam")
    yield (
        args.tune_state == "half" and optimizer == "sign",
        "--tune-state half: the gradient's sign has no moments; drop it, or give --tune-optimizer adam",
    )


def rotation_rules(args: argparse.Namespace) -> Rules:
    """Of flags of rotations."""
    for kind in rotations(args.rotate):
        yield kind not in ROTATIONS, f"--rotate {kind}: use {', '.join(ROTATIONS)} or all"
    yield args.rotate is not None and not rotations(args.rotate), f"--rotate: use {', '.join(ROTATIONS)} or all"
    yield args.rotate is None and args.rotate_seed is not None, "--rotate-seed: give --rotate too"
    yield (
        bool(args.rotate_steps) and not {"residual", "vo"} & set(rotations(args.rotate)),
        "--rotate-steps learns the rotations of the stream and of values: give --rotate residual,vo, or all",
    )
    bits = [args.wbits, getattr(args, "abits", None), getattr(args, "kvbits", None)]
    stays = min(b or FULL_BITS for b in bits) == FULL_BITS and getattr(args, "avg_bits", None) is None
    yield bool(args.rotate_steps) and stays, "--rotate-steps learns for what is quantized: give --wbits 1 to 8"


def plan_rules(args: argparse.Namespace) -> Rules:
    """Of flags of the plan."""
    yield (
        args.world_size is not None and not args.dry_run,
        f"--world-size {args.world_size} is of a plan: give --dry-run, or start the run with torchrun --nproc-per-node N",
    )


def block_rules(args: argparse.Namespace) -> Rules:
    """Of what is done to a block besides, on both command lines."""
    yield (
        args.bias_correction and args.wbits == FULL_BITS,
        "--bias-correction takes up the error of quantized weights: give --wbits 1 to 8",
    )
    yield (
        args.column_scales and args.wbits == FULL_BITS,
        "--column-scales makes weights easy to quantize: give --wbits 1 to 8",
    )
    for flag, bits in (("--head-bits", args.head_bits), ("--embedding-bits", args.embedding_bits)):
        yield (
            bits is not None and args.wbits == FULL_BITS,
            f"{flag} {bits} quantizes what is outside the blocks besides: give --wbits 1 to 8 too",
        )


def own_bits_rules(args: argparse.Namespace, own: int) -> Rules:
    """Of --grid that has bits and scales of its own."""
    grid = f"--grid {args.grid}"
    yield args.avg_bits is not None, f"{grid} has {own} bits everywhere: drop --avg-bits"
    yield args.avg_bits is None and args.wbits != own, f"{grid} has codes of {own} bits: drop --wbits {args.wbits}"
    yield args.outlier > 0, f"{grid} holds codes alone: drop --outlier"
    for flag, bits in (("--head-bits", args.head_bits), ("--embedding-bits", args.embedding_bits)):
        yield bits not in (None, own), f"{flag} {bits}: {grid} has {own} bits there too, or leave it out"


def super_grid_rules(args: argparse.Namespace) -> Rules:
    """Of --grid that is a type of GGUF's blocks."""
    kind = SUPER_GRIDS.get(args.grid)
    if kind is None:
        return
    grid = f"--grid {args.grid}"
    yield from own_bits_rules(args, kind.bits)
    yield (
        args.groupsize != kind.part,
        f"{grid} has scales for every {kind.part} columns: drop --groupsize {args.groupsize}",
    )
    yield args.act_order, f"{grid} holds columns in order: drop --act-order, or use --group-aware with gptq"
    yield (
        AUTOROUND in args.methods,
        f"{grid}: autoround tunes scales and zero points of their own; use another method, with --tune if wanted",
    )


def level_grid_rules(args: argparse.Namespace) -> Rules:
    """Of --grid with levels that are not evenly spaced, and of --act-grid."""
    yield (
        args.act_grid is not None and args.wbits == FULL_BITS,
        f"--act-grid {args.act_grid} rounds the inputs of quantized linears: give --wbits 1 to 8 or --grid {args.act_grid}",
    )
    kind = LEVEL_GRIDS.get(args.grid)
    if kind is None:
        return
    grid = f"--grid {args.grid}"
    yield from own_bits_rules(args, kind.bits)
    sizes = " or ".join(map(str, kind.groups))
    yield (
        args.groupsize not in kind.groups,
        f"{grid} has scales for {sizes} columns: use --groupsize {sizes} in place of {args.groupsize}",
    )
    yield (
        bool(args.tune) or AUTOROUND in args.methods,
        f"{grid}: tuning moves codes of evenly spaced levels; drop --tune and autoround (--preset balanced has none)",
    )
    yield (
        args.real_quant and args.grid in UNPACKED,
        f"{grid}: packed products are of at most 256 evenly spaced levels; drop --real_quant",
    )
    yield bool(args.rotate_steps), f"{grid}: --rotate-steps learns for evenly spaced levels; drop it"
    yield "spqr" in args.methods, f"{grid}: spqr quantizes its scales itself; use another method"
    yield (
        args.saliency > 0 and kind.rows > 1 and args.groupsize > 0,
        f"{grid}: --saliency solves rows in parts, and {kind.rows} rows share a scale: drop one of them",
    )


def grid_rules(args: argparse.Namespace) -> Rules:
    """Of flags of weights and activations."""
    yield args.a_symmetric and args.abits == FULL_BITS, "--a_symmetric is of activations: give --abits below 16"
    yield (
        args.real_quant and 8 < args.abits < FULL_BITS,
        f"--real_quant: no kernel takes activations of {args.abits} bits",
    )
    yield args.real_quant and args.wbits == FULL_BITS, "--real_quant packs quantized weights: give --wbits 1 to 8"
    yield (
        args.bit_balance == "on" and args.wbits > WIDEST_BALANCED,
        f"--bit-balance on: give --wbits 1 to {WIDEST_BALANCED} (2^bits + 1 levels have to fit in a byte)",
    )
    yield args.lwc and args.wbits == FULL_BITS, "--lwc clips quantized weights: give --wbits 1 to 8, or drop --lwc"
    yield (
        args.let and min(args.wbits, args.abits, args.kvbits) == FULL_BITS,
        "--let makes weights and activations easy to quantize: give one of --wbits, --abits, --kvbits below 16",
    )


def learning_rules(args: argparse.Namespace) -> Rules:
    """Of flags of learning."""
    yield (
        args.epochs > 0 and args.method != AUTOROUND and not (args.lwc or args.let),
        f"--epochs {args.epochs} with nothing to learn: give --lwc, --let or both, or --epochs 0",
    )
    yield (
        args.whole_model > 0 and not (args.lwc or args.let),
        f"--whole_model {args.whole_model} with nothing to learn: give --lwc, --let or both",
    )
    yield (
        args.resume is not None and not (args.lwc or args.let),
        "--resume needs the --lwc and --let flags of the run that learned the parameters",
    )
    yield (
        args.method == AUTOROUND and (args.lwc or args.let),
        "--method autoround has its own ranges: drop --lwc and --let, or give --tune with another method",
    )
    yield (
        args.method == AUTOROUND and args.solver != "rtn",
        f"--method autoround begins with rounding to nearest: drop --solver {args.solver}",
    )
    yield args.method == AUTOROUND and args.wbits == FULL_BITS, "--method autoround rounds weights: give --wbits 1 to 8"
    yield args.tune_online and not args.tune, "--tune-online: give --tune block, window:K or model too"
    yield (
        args.tune_online and not (args.let and (args.method == "flatquant" or args.use_ln_matrix)),
        "--tune-online moves what flatquant and --use_ln_matrix leave beside the weights: give --method flatquant --lwc --let",
    )
    yield (args.use_matrix or args.use_ln_matrix) and not args.let, "--use_matrix and --use_ln_matrix need --let"
    yield args.let_seams is not None and not args.let, "--let-seams needs --let"
    yield (
        args.method == "flatquant" and args.let and bool(set(ONLINE_ROTATIONS) & set(rotations(args.rotate))),
        "--method flatquant learns its own matrices in front of down projections and of heads: give --rotate residual,vo",
    )
    yield args.without is not None and args.method != "abq", "--without leaves out parts of abq: give --method abq"
    for part in args.left_out:
        yield part not in PARTS, f"--without {part}: use {', '.join(PARTS)}"
    for seam in args.seams:
        yield seam not in SEAMS, f"--let-seams {seam}: use {', '.join(SEAMS)}"
    yield (
        args.resume is not None and args.column_scales,
        "--resume takes what was learned on other columns: drop --column-scales, or learn anew",
    )
    yield args.act_scales is not None and not args.let, "--act-scales only matters with --let"
    yield (
        args.act_scales is not None and args.column_scales,
        "--act-scales was measured on inputs that --column-scales changes: drop one of them",
    )
    yield args.act_shifts is not None and args.act_scales is None, "--act-shifts needs --act-scales"


def file_rules(args: argparse.Namespace) -> Rules:
    """Of flags of what is written."""
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
