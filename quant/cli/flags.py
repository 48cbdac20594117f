"""Every flag of the command lines, declared once: names, defaults, allowed values, help, and what it sets."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.core.names import (
    ACT_GRIDS,
    ALL_GRIDS,
    AUTO_GROUPS,
    AUTO_SCOPE,
    AUTOROUND,
    DEFAULT_CACHE,
    DEQUANTIZED,
    DTYPES,
    FORMATS,
    LABELS,
    LAST_LOSSES,
    OPTIMIZERS,
    ROTATIONS,
    RUNTIMES,
    SAMPLED_LABELS,
    STATES,
)

QUANTIZER, LEARNER, SCALES = "model_quantizer.py", "main.py", "generate_act_scale_shift.py"
SWEEP = "scripts/sweep.py"
EVALUATE, REPEAT, GENERATE, CONVERT, REPORT = (
    f"python -m quant {name}" for name in ("evaluate", "repeat", "generate", "convert", "report")
)
RUNS, MEASURES = (QUANTIZER, LEARNER), (QUANTIZER, LEARNER, EVALUATE)
SESSIONS = (QUANTIZER, LEARNER, SCALES, EVALUATE)
ALL = (*SESSIONS, REPEAT, GENERATE, CONVERT, REPORT, SWEEP)

SOURCES = (
    "wikitext2, ptb, c4, mix, pile, demo, or a .txt/.jsonl/.json.gz/.parquet file; self or self:N: N windows (default "
    "--nsamples) that the full-precision model writes itself; SOURCE+self:N: behind the windows of another source"
)
SEAMS = ("norm", "vo", "qk", "mul")
PARTS = ("compensation", "distribution", "attention")  # of abq: fields of Learning
AUTO = "auto"
OPTIONS = "the solver's"  # the field of flags that are options of solvers


@dataclass(frozen=True)
class Valid:
    """Which values are allowed, and what a message says behind the flag and the value. None is a value left out."""

    allows: Callable[[Any], bool]
    says: str


MOST = 10**7  # of whatever is counted: windows, tokens, sweeps, epochs
MOST_PARTS = 8  # of the rows of a linear that have token weights of their own
MOST_SEED = 2**63 - 1  # what generators of random numbers take


@dataclass(frozen=True)
class Flag:
    """A flag of some command lines.

    field: what it sets: a field of a request, or with a dot one of ``learning``, ``transform`` or ``act``; OPTIONS: an
    option of solvers; None: nothing by itself. names: its spellings on every command line that has it, separated by
    blanks, the first of which names it in messages. default, valid, help, group, missing: for all of them, or a dict by
    command line. type: bool is a switch, list a flag that may be repeated. most: the largest number that is no slip of
    the hand. value: from what was given to the field's value. missing: what to say where it is left out and must not be.
    """

    field: str | None
    names: Mapping[str, str]
    help: str | dict[str, str] | None = None
    group: str | dict[str, str] | None = None
    default: Any = None
    type: Callable[[str], Any] = str
    valid: Valid | dict[str, Valid] | None = None
    most: int = MOST
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    missing: str | dict[str, str] | None = None
    required: tuple[str, ...] = ()
    value: Callable[[Any], Any] = lambda given: given

    def of(self, command: str, what: str) -> Any:
        """What the declaration says under ``what`` for a command line; None where it says nothing."""
        said = getattr(self, what)
        return said.get(command) if isinstance(said, dict) else said

    def mistake(self, command: str, value: Any) -> str | None:
        """What a message says behind the flag where the value is not allowed."""
        valid, shown = self.of(command, "valid"), f"{value:g}" if isinstance(value, float) else str(value)
        if value is not None and valid is not None and not valid.allows(value):
            return f" {shown}{valid.says}"
        if isinstance(value, float) and not math.isfinite(value):
            return f" {shown}: use a number"
        return (
            f" {shown}: use at most {self.most}" if isinstance(value, int | float) and abs(value) > self.most else None
        )

    def name(self, command: str) -> str:
        """The spelling in messages."""
        return self.names[command].split()[0]

    def dest(self, command: str) -> str:
        """The attribute of the parsed arguments."""
        return self.name(command).lstrip("-").replace("-", "_")


def same_name(name: str, commands: tuple[str, ...] = RUNS) -> dict[str, str]:
    """One spelling on several command lines, for `names`."""
    return dict.fromkeys(commands, name)


def size(word: str) -> int | str:
    """A group size as it is given: a number, or ``auto``. Raises ArgumentTypeError."""
    try:
        return word if word == AUTO else int(word)
    except ValueError:
        raise ArgumentTypeError(f"{word!r} is neither a whole number nor {AUTO}") from None


def split_words(given: str | None) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word for word in (given or "").split(",") if word)


def is_scope(word: str) -> bool:
    """Whether a word is what --tune takes."""
    return word in ("block", "model", AUTO_SCOPE) or bool(re.fullmatch("window:[1-9][0-9]{0,3}", word))


def rotations(given: str | None) -> tuple[str, ...]:
    """The kinds of --rotate; ``all`` stands for every one."""
    words = split_words(given)
    return ROTATIONS if words == ("all",) else words


AT_LEAST_0 = Valid(lambda n: n >= 0, ": use 0 or more")
AT_LEAST_1 = Valid(lambda n: n >= 1, ": use 1 or more")
AT_LEAST_2 = Valid(lambda n: n >= 2, ": use 2 or more")
DIRECTORY = Valid(lambda path: path.is_dir(), " is not a directory")
FILE = Valid(lambda path: path.is_file(), ": no such file")
ACT_BITS = Valid(lambda bits: 2 <= bits <= 16, ": use 2 to 15, or 16 to leave activations alone")
NOT_HOME = Valid(lambda path: path.parts[:1] != ("~",), ": ~ is no directory here; set HOME or give another place")
RATE = Valid(lambda rate: 0 < rate < math.inf, ": use a positive rate")
SHARE = Valid(lambda share: 0 < share <= 1, ": use a number above 0, at most 1")
MATRIX_BITS = Valid(lambda bits: 1 <= bits <= 8, ": use 1 to 8, or leave it out")
WEIGHT_BITS = (*range(1, 9), 16)

WHAT = {QUANTIZER: "what is quantized, and how", LEARNER: "what is quantized"}
LEARNED, LEARNING, ROUNDED = "what is learned", "how it is learned", "how it is rounded"
METHODS = {QUANTIZER: "options of the methods", LEARNER: ROUNDED}
TUNED = {QUANTIZER: WHAT[QUANTIZER], LEARNER: ROUNDED}
DATA = {**dict.fromkeys(MEASURES, "calibration and evaluation data")}
WHERE = {**dict.fromkeys(SESSIONS, "where it runs")}
RESULTS = {**dict.fromkeys(RUNS, "results"), EVALUATE: DATA[EVALUATE]}
PACKED_HELP = (
    "evaluate with the weights packed in memory, and pack the checkpoint (without --format: the first that can "
    "hold it of gptq, gptq_v2 where asymmetric, compressed-tensors, bitplane)"
)
NO_MODEL = "--model is missing: a hub id or a local directory (models/demo/{} is one)"

QUANTIZED_FLAGS = (
    Flag(
        "model", same_name("--model", SESSIONS), {
            **dict.fromkeys(RUNS, "hub id, local directory or GGUF file; the family comes from its config"),
            SCALES: "hub id, local directory or GGUF file", EVALUATE: "hub id, directory or GGUF file, also one of --save",
        }, WHAT, metavar="ID|DIR", required=(EVALUATE,),
        missing={**dict.fromkeys(RUNS, NO_MODEL.format("llama")), SCALES: NO_MODEL.format("opt")},
    ),
    Flag(
        "family", same_name("--family", (*SESSIONS, GENERATE, CONVERT)),
        "take a model of an unknown type for one of this family, by a model type of it (--list shows all); at your risk: its "
        "first blocks are tried, the others are not (default: from its config)", WHAT, metavar="TYPE",
    ),
    Flag(
        None, {QUANTIZER: "--quantization-method"},
        "rtn, gptq, quantease, gptq_quantease, spqr, autoround, or several with commas (default: quantease)", WHAT,
        "quantease", metavar="NAME[,NAME]",
    ),
    Flag(
        "wbits", same_name("--wbits"), {
            QUANTIZER: "bits of a weight, 1 to 8; 16 evaluates the base model (default: 16)",
            LEARNER: "bits of a weight, 1 to 8, or 16 (default: 4)",
        }, WHAT, {QUANTIZER: 16, LEARNER: 4}, int, {
            QUANTIZER: Valid(lambda bits: bits in WEIGHT_BITS, ": use 1 to 8, or 16 for the base model"),
            LEARNER: Valid(lambda bits: bits in WEIGHT_BITS, ": use 1 to 8, or 16 to leave weights alone"),
        },
    ),
    Flag("avg_bits", {QUANTIZER: "--avg-bits"},
         "in place of --wbits: every linear the width, of 2 to 8, that costs the model least, within so many stored bits a "
         "weight on average, scales and zero points counted; linears are solved at up to four widths first", WHAT,
         type=float, valid=Valid(lambda bits: 2 <= bits <= 16, ": use a number from 2 to 16"), metavar="B"),
    Flag("act.bits", {LEARNER: "--abits"}, "bits of an activation, 2 to 15, or 16 (default: 16; affinequant: 4)", WHAT,
         type=int, valid=ACT_BITS),
    Flag("act.kv_bits", {LEARNER: "--kvbits"}, "bits of keys and values (default: as --abits)", WHAT, type=int,
         valid=ACT_BITS),
    Flag(
        "group_size", {QUANTIZER: "--groupsize --group-size", LEARNER: "--group_size"}, {
            QUANTIZER: "columns that share a scale; auto: the largest power of two up to 128 that divides the inputs of "
                       "every linear; -1: one scale a row (default: -1)",
            LEARNER: "columns that share a scale; auto: the largest power of two up to 128 that divides the inputs of "
                     "every linear (default: a scale a row)",
        }, WHAT, {QUANTIZER: -1}, size, {
            QUANTIZER: Valid(lambda n: n == AUTO or n >= 1 or n == -1, ": use a positive number, auto or -1"),
            LEARNER: Valid(lambda n: n == AUTO or n >= 1 or n == -1, ": use a positive number or auto, or leave it out"),
        }, metavar="N", value=lambda n: -1 if n is None else AUTO_GROUPS if n == AUTO else n,
    ),
    Flag("symmetric", {QUANTIZER: "--sym", LEARNER: "--symmetric"},
         {QUANTIZER: "symmetric grid: zero point fixed at 2^(bits-1)", LEARNER: "symmetric weight grid"}, WHAT,
         type=bool),
    Flag(None, {LEARNER: "--disable_zero_point"}, "the same: no zero points for weights", WHAT, type=bool),
    Flag(
        "act.method", {LEARNER: "--a_dynamic_method"},
        "range of activations: every token's, every call's, or fixed by calibration once a block is learned "
        "(it trains with every call's, so the loss is not that of what is deployed) (default: per_token)",
        WHAT, "per_token", choices=("per_token", "per_tensor", "static"),
    ),
    Flag("act.symmetric", {LEARNER: "--a_symmetric"},
         "symmetric range of the linears' inputs, as W8A8 runtimes compute", WHAT, type=bool),
    Flag(None, {LEARNER: "--w_dynamic_method"}, None, WHAT, "per_channel", choices=("per_channel",)),
    Flag(None, {LEARNER: "--bit-balance"},
         "2^bits + 1 levels; auto: with --method abq at 1 and 2 bits (five levels are stored in 3 bits)", WHAT, "auto",
         choices=("auto", "on", "off")),
    Flag("range", {QUANTIZER: "--range"},
         "grid range: min-max, or the shrink with the least error weighted by the Gram diagonal", WHAT, "minmax",
         choices=("minmax", "mse")),
    Flag("grid_kind", {QUANTIZER: "--grid"},
         "what a code of 0 stands for: an integer number of steps below 0; real: a 16-bit minimum of its own, finer at few "
         "bits; fractional: a number of 1/32 steps, in the bits of an integer one (the scale has fewer digits). These two are "
         "held by --format bitplane and dequantized. q2_k to q6_k and iq4_nl: a type of llama.cpp's blocks, scales and all, "
         "solved on as --format gguf then holds it (linears of narrow rows get the type that llama.cpp gives them); nvfp4, mxfp4, fp8 (a scale a row, or with --groupsize 128 for 128x128 "
         "weights): floats, as --format compressed-tensors holds them. All of these set --wbits and --groupsize", WHAT,
         "integer", choices=ALL_GRIDS),
    Flag(None, {QUANTIZER: "--act-grid"},
         "round the inputs of all linears too, as the model runs: a scale a token (fp8), for 32 (mxfp4) or 16 of its numbers "
         "(nvfp4)", WHAT, choices=ACT_GRIDS),
    Flag(None, {QUANTIZER: "--preset"},
         "a set of flags, with quantease; flags that are given besides stay. fast: searched and refitted grids, seconds for "
         "a small model; balanced: also one linear after the other, for the original model's outputs, about twice as long; "
         "best: also --tune auto --tune-norms, and behind the data seven times as many windows that the model writes "
         "itself where it fits in memory, minutes for a small model (docs/which-method.md has what each is worth)", WHAT,
         choices=("fast", "balanced", "best")),
    Flag("tuning.scope", same_name("--tune"),
         "after solving, move codes and scales by gradients: block: every block on its output; window:K: K blocks together on "
         "the output of the last; model: all together on the model's logits (slower and better; the model must fit in "
         "memory); auto: the model where it fits, else blocks; what does not help on held-out windows is not kept", TUNED,
         valid=Valid(is_scope, ": use block, window:K with 1 to 9999 blocks, model or auto"), metavar="SCOPE"),
    Flag("tuning.iterations", same_name("--tune-iterations"),
         "steps of --tune (default: 200 a block or window, 400 for the model)", TUNED, type=int, valid=AT_LEAST_1, metavar="N",
         ),
    Flag("tuning.rate", same_name("--tune-rate"),
         "of positions of weights, in steps of their grid (default: 1e-2 at 2 bits, 2.5e-3 at 3, 1.5e-3 at 4, 1e-3 above)",
         TUNED, type=float, valid=RATE, metavar="X"),
    Flag("tuning.grid_rate", same_name("--tune-grid-rate"),
         "of scales, relative, and of norms (default: 1e-3; of autoround's ranges that of its offsets)", TUNED, type=float,
         valid=RATE, metavar="X"),
    Flag("tuning.norms", same_name("--tune-norms"), "--tune moves norms and biases too, in the checkpoint's dtype",
         TUNED, type=bool, value=lambda given: given or None),
    Flag("tuning.optimizer", same_name("--tune-optimizer"),
         "Adam, or the gradient's sign with a rate of one over the steps (default: adam; autoround: sign)", TUNED,
         choices=OPTIMIZERS),
    Flag("tuning.drop", same_name("--tune-drop"),
         "share of the largest errors of a block's output that do not count (default: 1e-3; autoround: 0)", TUNED, type=float,
         valid=Valid(lambda x: 0 <= x < 1, ": use a share from 0, below 1"), metavar="X"),
    Flag("tuning.last", same_name("--tune-last"),
         "what the last block, or window, is tuned for: its output, the divergence of the model's logits, or the loss of the language "
         "model (default: mse)", TUNED, choices=LAST_LOSSES),
    Flag("tuning.recompute", same_name("--tune-recompute"),
         "--tune keeps the inputs of blocks alone and computes the rest again in the backward pass: less memory, a third "
         "more time, the same numbers", TUNED, type=bool, value=lambda given: given or None),
    Flag("tuning.online", {LEARNER: "--tune-online"},
         "--tune moves what learning left beside the weights too, matrices and clips of activations, at the rate of scales: with "
         "the codes, which are free of the basis that the matrices make", TUNED, type=bool, value=lambda given: given or None),
    Flag("tuning.state", same_name("--tune-state"),
         "what Adam's two moments of every weight are kept in: full: float32, or half: bfloat16, rounded by chance so that "
         "their means stay; 4 bytes less a weight (default: full)", TUNED, choices=STATES),
    Flag("rotation.kinds", same_name("--rotate"),
         f"before anything is solved, rotate by random Hadamard matrices: of {', '.join(ROTATIONS)}, or all. residual, vo: in "
         "the weights (of every format); qk (for --kvbits), down: as the model runs (format bitplane)", WHAT,
         metavar="A,B", value=rotations),
    Flag("rotation.seed", same_name("--rotate-seed"), "of the random matrices (default: 0)", WHAT, type=int,
         valid=AT_LEAST_0, most=MOST_SEED, metavar="N", value=lambda given: given or 0),
    Flag("rotation.steps", same_name("--rotate-steps"),
         "N steps that learn the rotations of --rotate residual and vo, from the random ones, on the logits of the whole model "
         "with weights and activations rounded (SpinQuant); the model must fit in memory: 200 are a good number (default: 0)",
         WHAT, type=int, valid=AT_LEAST_0, metavar="N", value=lambda given: given or 0),
    Flag("head_bits", same_name("--head-bits"),
         "quantize the head (lm_head) too, with the same method: its Gram matrix is that of the hidden states behind the last "
         "norm. A head that is tied to the embedding stays one tensor, which --format bitplane, gguf and dequantized hold "
         "(default: it stays as it is)", WHAT, type=int, valid=MATRIX_BITS, metavar="N"),
    Flag("embedding_bits", same_name("--embedding-bits"),
         "quantize the embedding too: a row is looked up and multiplied with nothing, so it is rounded row by row with a "
         "searched range, whatever the method; where the head is tied to it, as --head-bits. For --format bitplane, gguf and "
         "dequantized (default: it stays as it is)", WHAT, type=int, valid=MATRIX_BITS, metavar="N"),
    Flag("num_layers", {QUANTIZER: "--num-layers-to-quantize"}, "only the first N blocks", WHAT, 1000, int, AT_LEAST_1,
         metavar="N"),
)  # fmt: skip

LEARNED_FLAGS = (
    Flag(None, {LEARNER: "--method"}, "default: affinequant with --use_matrix or --use_ln_matrix, else omniquant; autoround: offsets of weights and ranges, "
         "block by block after rounding to nearest (--tune-...)",
         LEARNED, choices=("omniquant", "affinequant", "abq", "flatquant", AUTOROUND)),
    Flag("learning.clip", {LEARNER: "--lwc"}, "learnable weight clipping", LEARNED, type=bool),
    Flag("transform.let", {LEARNER: "--let"}, "learnable equivalent transforms", LEARNED, type=bool),
    Flag("transform.matrix", {LEARNER: "--use_matrix"}, "affine matrices for each head on q-k and v-o", LEARNED,
         type=bool),
    Flag("transform.norm_matrix", {LEARNER: "--use_ln_matrix"}, "a dense matrix behind every norm, kept in the model",
         LEARNED, type=bool),
    Flag("transform.stability", {LEARNER: "--sf --stability_factor"},
         "factor of matrix entries off the diagonal, in (0, 1] (default: 1.0)", LEARNED, 1.0, float, SHARE,
         metavar="X"),
    Flag("transform.alpha", {LEARNER: "--alpha"}, "SmoothQuant's exponent of the starting scale (default: 0.5)",
         LEARNED,
         0.5, float, Valid(lambda x: 0 <= x <= 1, ": use a number from 0 to 1")),
    Flag(None, {LEARNER: "--without"}, f"of {', '.join(PARTS)}: parts of abq that are left out", LEARNED,
         metavar="A,B"),
    Flag("transform.kinds", {LEARNER: "--let-seams"}, f"of {', '.join(SEAMS)} (default: the method's)", LEARNED,
         metavar="A,B", value=split_words),
    Flag("transform.tied", {LEARNER: "--let-rope"},
         "q/k scales that commute with rotary embeddings; untied: as published, not an equivalence", LEARNED, "tied",
         choices=("tied", "untied"), value=lambda given: given == "tied"),
    Flag("transform.precise", {LEARNER: "--inverse-dtype"}, "of matrix inverses", LEARNED, "float32",
         choices=("float32", "float64"), value=lambda given: given == "float64"),
    Flag("act_scales", {LEARNER: "--act-scales"}, "of generate_act_scale_shift.py (default: measured)", LEARNED,
         type=Path, valid=FILE, metavar="FILE"),
    Flag("act_shifts", {LEARNER: "--act-shifts"}, "of generate_act_scale_shift.py (default: measured)", LEARNED,
         type=Path, valid=FILE, metavar="FILE"),
    Flag("learning.epochs", {LEARNER: "--epochs"}, "0: only what --resume learned (default: 10)", LEARNING, 10, int,
         AT_LEAST_0),
    Flag("learning.batch", {LEARNER: "--batch_size"}, "windows a step (default: 1)", LEARNING, 1, int, AT_LEAST_1),
    Flag("learning.let_lr", {LEARNER: "--let_lr"}, "rate of transforms (default: 5e-3)", LEARNING, 5e-3, float, RATE),
    Flag("learning.lwc_lr", {LEARNER: "--lwc_lr"}, "rate of clips (default: 1e-2)", LEARNING, 1e-2, float, RATE),
    Flag("learning.weight_decay", {LEARNER: "--wd"}, "weight decay (default: 0)", LEARNING, 0.0, float,
         Valid(lambda x: 0 <= x < math.inf, ": use 0 or a positive number")),
    Flag("learning.together", {LEARNER: "--whole_model"},
         "behind the epochs, N steps that train what was learned of all blocks together on the logits of the whole model, "
         "which must fit in memory: 400 are a good number, on a thousand windows; the solver comes after them (default: 0)",
         LEARNING, 0, int, AT_LEAST_0, metavar="N"),
    Flag("learning.augmented", {LEARNER: "--aug_loss"}, "also match the full-precision block on quantized inputs",
         LEARNING, type=bool),
    Flag("learning.patience", {LEARNER: "--patience"}, "stop a block after N epochs without a better loss", LEARNING, 0,
         int, Valid(lambda n: n >= 0, ": use 1 or more epochs, or 0 to train them all"), metavar="N"),
    Flag(None, {LEARNER: "--deactive_amp"},
         "train and evaluate in float32 on a GPU too, unless --dtype says otherwise (default there: bfloat16)",
         LEARNING,
         type=bool),
    Flag("resume", {LEARNER: "--resume"}, "start from the learned parameters of that run directory", LEARNING,
         type=Path,
         metavar="DIR"),
)  # fmt: skip

SOLVER_FLAGS = (
    Flag("solver", {LEARNER: "--solver"}, "rtn, gptq, quantease, ... on the learned grid (default: rtn)", ROUNDED,
         "rtn",
         metavar="NAME"),
    Flag("true_sequential", same_name("--true-sequential"), {
        QUANTIZER: "linears of a block in order of execution, each seeing what is quantized already",
        LEARNER: "for solvers: linears in order of execution",
    }, {QUANTIZER: WHAT[QUANTIZER], LEARNER: ROUNDED}, type=bool),
    Flag("target_correction", same_name("--target-correction"),
         "solve for the outputs of the original model on its own inputs, not for those of its weights on the quantized "
         "model's: 1 wholly, 0 not at all (default: 0)", METHODS, 0.0, float,
         Valid(lambda x: 0 <= x <= 1, ": use a number from 0 to 1"), metavar="X"),
    Flag("residual_correction", same_name("--residual-correction"),
         "with --target-correction: linears that add to the residual stream also make up for its error", METHODS,
         type=bool),
    Flag("saliency", same_name("--saliency"),
         "weigh calibration tokens by the model's gradients, apart for each of N equal parts of the rows of every linear, 1 "
         "to 8; one backward pass of the full-precision model, block by block (default: 0, all tokens alike)", METHODS, 0,
         int, Valid(lambda n: 0 <= n <= MOST_PARTS, f": use 1 to {MOST_PARTS} parts, or 0"), metavar="N"),
    Flag("saliency_labels", same_name("--saliency-labels"),
         "what those gradients are taken for: tokens sampled from the model's own softmax (twice), or the text's next ones "
         "(default: sampled)", METHODS, SAMPLED_LABELS, choices=LABELS),
    Flag("column_scales", same_name("--column-scales"),
         "before a block is solved, scales that make inputs and weight columns alike go into norms and the rows of linears "
         "in front: exact, no bits; takes outlier channels away", {QUANTIZER: WHAT[QUANTIZER], LEARNER: WHAT[LEARNER]},
         type=bool),
    Flag("bias_correction", same_name("--bias-correction"),
         "where a linear has a bias, it takes up the mean error of what was solved", {QUANTIZER: WHAT[QUANTIZER],
         LEARNER: ROUNDED}, type=bool),
    Flag(OPTIONS, same_name("--num-iter"), {
        QUANTIZER: "quantease, gptq_quantease: coordinate-descent sweeps (default: 30)",
        LEARNER: "quantease: sweeps (default: 30)",
    }, METHODS, 30, int, AT_LEAST_1),
    Flag(OPTIONS, {QUANTIZER: "--act-order"}, "columns by decreasing Gram diagonal; groups are formed in that order",
         METHODS, type=bool),
    Flag(OPTIONS, {QUANTIZER: "--group-aware"},
         "gptq: act-order among and inside groups, which keeps column i in group i // group size", METHODS, type=bool),
    Flag(OPTIONS, {QUANTIZER: "--search-grid"},
         "quantease: scales by the lowest end of short descents, row by row", METHODS, type=bool),
    Flag(OPTIONS, {QUANTIZER: "--refit-grid"},
         "quantease: scales and zero points in closed form between sweeps", METHODS, type=bool),
    Flag(OPTIONS, {QUANTIZER: "--static-groups"}, "group grids from the original weights, before act-order", METHODS,
         type=bool),
    Flag(OPTIONS, same_name("--percdamp"), {
        QUANTIZER: "gptq: damping, share of the mean Gram diagonal (default: 0.01)",
        LEARNER: "gptq: damping (default: 0.01)",
    }, METHODS, 0.01, float, SHARE),
    Flag(OPTIONS, {QUANTIZER: "--auto-damp"}, "gptq: raise the damping stepwise where the Gram matrix is singular",
         METHODS, type=bool),
    Flag(OPTIONS, {QUANTIZER: "--outlier"},
         "quantease: share of the weights kept in 16 bits (0.01); spqr: relative threshold (0.2; smaller keeps more)",
         METHODS, 0.0, float, Valid(lambda x: 0 <= x < math.inf, ": use 0 or a positive number"), metavar="X"),
    Flag(OPTIONS, {QUANTIZER: "--alpha"}, "quantease: multiplier of the outliers' gradient step", METHODS, 1.0, float,
         Valid(lambda x: 0 < x <= 2, ": use a number above 0, at most 2")),
    Flag(OPTIONS, {QUANTIZER: "--structure-outlier"}, "quantease: whole columns as outliers", METHODS, type=bool),
    Flag(OPTIONS, {QUANTIZER: "--simplified-outliers"}, "spqr: outliers do not leave the range of their group", METHODS,
         type=bool),
    Flag(None, same_name("--solver-option"),
         {QUANTIZER: "any option of the method (--list)", LEARNER: "any option of the solver (--list)"}, METHODS,
         type=list,
         metavar="KEY=VALUE"),
)  # fmt: skip

DATA_FLAGS = (
    Flag(None, {SCALES: "--scales-output-path"}, default=Path("./act_scales/"), type=Path, metavar="DIR"),
    Flag(None, {SCALES: "--shifts-output-path"}, default=Path("./act_shifts/"), type=Path, metavar="DIR"),
    Flag("nsamples", {**same_name("--nsamples", MEASURES), SCALES: "--num-samples --nsamples"},
         {**dict.fromkeys(MEASURES, "calibration windows (default: 128)"), SCALES: "windows (default: 128)"}, DATA, 128,
         int, AT_LEAST_1),
    Flag("seqlen", {**same_name("--seqlen", MEASURES), SCALES: "--seq-len"}, {
        **dict.fromkeys(MEASURES, "tokens of a window (default: the model's maximum, at most 2048)"),
        SCALES: "tokens of a window (default: 2048)",
    }, DATA, {SCALES: 2048}, int, AT_LEAST_2),
    Flag("seed", same_name("--seed", SESSIONS), {
        **dict.fromkeys(MEASURES, "of the calibration sampling (default: %(default)s)"),
        SCALES: "of the sampling (default: 2)",
    }, DATA, {QUANTIZER: 0, LEARNER: 2, SCALES: 2, EVALUATE: 0}, int, most=MOST_SEED),
    Flag("eval_datasets", same_name("--eval-datasets", MEASURES),
         "names or files; '' for none (default: wikitext2,ptb,c4)", DATA, "wikitext2,ptb,c4", metavar="A,B",
         value=split_words),
    Flag("data_dir", same_name("--data-dir", SESSIONS), {
        **dict.fromkeys(MEASURES, "local copies laid out as on the hub: no network needed"),
        SCALES: "local copies laid out as on the hub",
    }, DATA, type=Path, valid=DIRECTORY, metavar="DIR"),
    Flag("full_precision_eval", same_name("--no-fp-eval", MEASURES),
         "skip the full-precision model (no ratio, no KL divergence)", DATA, type=bool, value=lambda given: not given),
    Flag("tasks", same_name("--tasks", MEASURES), "lm-eval tasks, and the demo's own demo_*: piqa,arc_easy,...",
         DATA, "",
         metavar="A,B", value=split_words),
    Flag("task_path", same_name("--task-path", MEASURES), "directory of more lm-eval tasks (YAML)", DATA, type=Path,
         valid=DIRECTORY, metavar="DIR"),
    Flag("num_fewshot", same_name("--num_fewshot", MEASURES),
         "examples in front of a task's items (default: the task's)", DATA, {LEARNER: 0}, int, AT_LEAST_0, metavar="N"),
    Flag("dataset", {QUANTIZER: "--dataset", **same_name("--calib_dataset --dataset", (LEARNER, SCALES))},
         f"{SOURCES} (default: %(default)s)", DATA, {QUANTIZER: "c4", LEARNER: "wikitext2", SCALES: "wikitext2"}),
    Flag(None, {LEARNER: "--eval_ppl"}, "evaluate perplexity on --eval-datasets", DATA, type=bool),
    Flag("limit", same_name("--limit", MEASURES), {
        QUANTIZER: "evaluate the first N windows and items only",
        LEARNER: "evaluate the first N windows and items only (default: -1, all)",
        EVALUATE: "the first N windows and items only",
    }, DATA, {LEARNER: -1}, int, {
        **dict.fromkeys((QUANTIZER, EVALUATE), AT_LEAST_1),
        LEARNER: Valid(lambda n: n >= 1 or n == -1, ": use 1 or more, or -1 for all"),
    }, metavar="N", value=lambda n: None if n == -1 else n),
)  # fmt: skip

TALK_FLAGS = (
    Flag(None, {GENERATE: "--model"}, "a run directory or any checkpoint", metavar="RUN|DIR|ID", required=(GENERATE,)),
    Flag(None, {GENERATE: "--prompt"}, "text to continue", required=(GENERATE,)),
    Flag(None, {GENERATE: "--max-new-tokens"}, "(default: 100)", None, 100, int, AT_LEAST_1, metavar="N"),
    Flag(None, {GENERATE: "--temperature"}, "0: the most likely token (default: 0)", None, 0.0, float,
         Valid(lambda t: 0 <= t < math.inf, ": use 0 or more, a finite number")),
    Flag(None, {GENERATE: "--seed"}, "of --temperature above 0 (default: 0)", None, 0, int, AT_LEAST_0, most=2**64 - 1),
    Flag(None, {GENERATE: "--round-inputs"}, "round what packed linears read to 8 bits, a scale for 32 inputs, as "
         "llama.cpp does: faster, on CPUs with AVX2 and for groups of whole 32s (others stay as they are)", type=bool),
)  # fmt: skip

MACHINE_FLAGS = (
    Flag("device", same_name("--device", (*SESSIONS, GENERATE)), "auto, cpu, cuda or cuda:N (default: auto)", WHERE,
         "auto"),
    Flag("dtype", same_name("--dtype", (*SESSIONS, GENERATE)), {
        **dict.fromkeys(SESSIONS, "of the arithmetic (default: the checkpoint's; float32 on a CPU)"),
        LEARNER: "of the arithmetic (default: bfloat16 on a GPU, whatever the checkpoint's; float32 on a CPU)",
        GENERATE: "float32 on a CPU",
    }, WHERE, "auto", choices=("auto", *DTYPES)),
    Flag("solver_precision", same_name("--solver-precision", SESSIONS),
         "of float32 products inside the methods; high: TF32 on a GPU; errors are always measured in full float32",
         WHERE,
         "highest", choices=("highest", "high", "medium")),
    Flag("calib_batch", same_name("--calib-batch", SESSIONS), "windows that pass a block at a time (default: 4)",
         WHERE, 4,
         int, AT_LEAST_1, metavar="N"),
    Flag("activation_store", same_name("--activation-store", SESSIONS), "where hidden states wait (default: cpu)",
         WHERE,
         "cpu", choices=("device", "cpu", "disk")),
    Flag("cache_dir", same_name("--cache-dir", (*SESSIONS, REPEAT, GENERATE, CONVERT)), {
        **dict.fromkeys(SESSIONS, "tokens and converted checkpoints (default: %(default)s)"),
        REPEAT: "of models and tokens (default: %(default)s)",
        **dict.fromkeys((GENERATE, CONVERT), "of models (default: %(default)s)"),
    }, WHERE, {
        **dict.fromkeys((LEARNER, SCALES), Path("cache")),
        **dict.fromkeys((QUANTIZER, EVALUATE, REPEAT, GENERATE, CONVERT), DEFAULT_CACHE),
    }, Path, NOT_HOME, metavar="DIR"),
    Flag("deterministic", same_name("--deterministic", SESSIONS),
         "only deterministic algorithms on CUDA (a CPU always is); packed products by constants, not by what was measured", WHERE, type=bool),
    Flag("trust_remote_code", same_name("--trust-remote-code", (*SESSIONS, REPEAT, GENERATE, CONVERT)), {
        **dict.fromkeys(SESSIONS, "run code that comes with the model (off by default)"),
        REPEAT: "run code that comes with the model, if the run did",
        CONVERT: "of a model that brings its own classes",
    }, WHERE, type=bool),
    Flag("attn_implementation", {LEARNER: "--attn_implementation"},
         "of transformers: eager, sdpa (faster) (default: eager)", WHERE, "eager", choices=("eager", "sdpa")),
    Flag(None, {LEARNER: "--multigpu"}, "accepted; several devices work together under torchrun", WHERE, type=bool),
    Flag(None, {LEARNER: "--net"}, "accepted; the family comes from the configuration", WHERE),
)  # fmt: skip

RESULT_FLAGS = (
    Flag("format", same_name("--format"), f"of the checkpoint: {', '.join(FORMATS)} (default: dequantized)", RESULTS,
         choices=FORMATS, metavar="NAME", value=lambda given: given or DEQUANTIZED),
    Flag("target", same_name("--target"),
         f"refuse before work begins what {', '.join(RUNTIMES)} cannot load (--dry-run shows all of them)", RESULTS,
         choices=RUNTIMES, metavar="NAME"),
    Flag("run_dir", same_name("--run-dir"), {
        QUANTIZER: "journal, blocks, results (default: a name under runs/)",
        LEARNER: "journal, blocks, results (default: a name under --output_dir)",
    }, RESULTS, type=Path, metavar="DIR"),
    Flag("overwrite", {**same_name("--overwrite"), CONVERT: "--overwrite"}, {
        **dict.fromkeys(RUNS, "discard what the run directory holds (default: continue it)"),
        CONVERT: "replace a checkpoint that is there",
    }, RESULTS, type=bool),
    Flag(None, same_name("--compute-quantization-recon-error"), "print the relative error of every linear", RESULTS,
         type=bool),
    Flag("packed", same_name("--real_quant", MEASURES), {
        **dict.fromkeys(RUNS, PACKED_HELP),
        EVALUATE: "keep a quantized checkpoint packed in memory",
    }, RESULTS, type=bool),
    Flag(None, same_name("--no-report"), "do not write report.html, report.csv and its pictures", RESULTS, type=bool),
    Flag(None, same_name("--dry-run"), "plan, memory, time and size; nothing is run", RESULTS, type=bool),
    Flag(None, same_name("--world-size"), "--dry-run: of so many processes, as torchrun starts them", RESULTS, None, int,
         AT_LEAST_1, most=1 << 16, metavar="N"),
    Flag(None, same_name("--list"), "methods with their options, families, formats, data sets", RESULTS, type=bool),
    Flag(None, same_name("--log-level", ALL), "debug: also the traceback of an error (default: %(default)s)",
         dict.fromkeys(RUNS, "results"), {**dict.fromkeys(ALL, "warning"), REPORT: "error", SWEEP: "error"},
         choices=("debug", "info", "warning", "error")),
    Flag("runs", {LEARNER: "--output_dir"}, "where run directories are made (default: ../log/)", RESULTS,
         Path("../log/"), Path),
    Flag("save", {QUANTIZER: "--save", LEARNER: "--save_dir"}, "write the quantized checkpoint and results.json here",
         RESULTS, type=Path, metavar="DIR"),
    Flag("imatrix", {QUANTIZER: "--imatrix"},
         "also write what inputs weigh on the calibration text, for llama.cpp's own quantizer (llama-quantize --imatrix FILE)", RESULTS,
         type=Path, metavar="FILE"),
    Flag(None, {QUANTIZER: "--compare-layers"},
         "only compare: every method solves every linear from one set of statistics; one table", RESULTS, type=bool),
)  # fmt: skip

TABLE = (*QUANTIZED_FLAGS, *LEARNED_FLAGS, *SOLVER_FLAGS, *DATA_FLAGS, *TALK_FLAGS, *MACHINE_FLAGS, *RESULT_FLAGS)
