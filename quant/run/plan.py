"""`--dry-run`: what a run would take, from the model's configuration and rates measured on this machine.

Memory (bytes)
  block       parameters of a block x bytes of the arithmetic's dtype
  statistics  4·in² for every Gram matrix alive: all groups of a block, or the largest with --true-sequential
              of a mixture's experts 3 for the largest, as experts come one after another (COPIES more for each of those
              that a GPU solves at once), and one of all tokens
  solver      of the linear that takes most, the Gram matrix itself is statistics': what the solver declares (its workspace
              in quant/solvers; those of the libraries' factorizations are not in it), and at least 3.25·4·out·in to
              measure the error (weight, codes, values, error), 2·4·out·in more with groups
  batch       --calib-batch x seqlen x (8·hidden + 3·widest linear) x bytes of the dtype
  learning    4·6 for every parameter of a block (original, transformed, rounded, and what their gradients need) and
              --batch_size x seqlen x (17·hidden + 2.5·heads·seqlen) x bytes of the dtype for the backward pass
              (Korthikanti et al. 2022, equation 2); with --whole_model the parameters of all blocks and the inputs of
              each besides (quant/tune/limits.py); with --rotate-steps the same
  tuning      with --tune: for every weight that is tuned at a time its parameter, best iterate and moments, and what its
              gradient needs; the gradient of one linear; what a block keeps of a token, and the logits (quant/tune/limits.py)
  quantized   codes, scales, zero points or minima; 16 bits for every number of an online matrix; with --outlier of
              quantease 32 bits more for each outlier (16 for each weight of an outlier column); spqr's outliers depend
              on the weights and are not in it
  saliency    with --saliency R: statistics of R parts of every linear besides; hidden states in front of all blocks and
              gradients of every draw on the host; on the device the graph of --calib-batch windows, as in learning, and
              20 for every logit that is held at a time
  device      the larger of block + the largest of statistics + solver, statistics + batch, and learning; and of embeddings
              and head with what they are in use for: a batch, or five arrays of logits, 4 bytes each, while the head is
              evaluated (HEAD_ELEMENTS at a time); with --head-bits also 4·hidden² for the head's Gram matrix (twice with the
              original's inputs beside) and what the solver takes of PART weights of it at a time
  host        hidden states nsamples x seqlen x hidden (on the device or on disk instead, if asked for); learning holds
              two of them, one more for --aug_loss and one for an attention loss; tuning one more, a window of blocks two;
              what a mixture's experts are called with is as much again; with a GPU the next block, which is read while this
              one is worked on (quant/blocks/reading.py)
  kept        with --true-sequential or a corrected target what solved linears write, for the next steps, in at most an eighth
              of what is free (quant/blocks/kept.py); not in the peak
  process     on a CPU, all that the operating system counts: the libraries, device, host, and the pages of the checkpoint
              that were read, which it takes back when it needs room
Time (seconds)
  calibrate   of the windows, and of those that are held out, 2·parameters of a block flops a token for each pass (one
              observes, one advances; with --true-sequential one for every step, in which linears are multiplied once if there
              is room for what they write), at the measured matrix-product rate of the dtype; in each pass attention
              (4·heads·head_dim flops for every key that a token sees, on average, as if every mask were causal and left out
              by tiles; twice, where what it writes is kept) and, at the measured rate of copies, OF_HIDDEN·hidden + OF_WIDEST·widest numbers read and
              written between the linears;
              Gram (1 + 1/b)·in² flops a token and group for in columns in b blocks, at the float32 rate; with the
              original model's inputs beside (--target-correction, gptaq, qronos) 2·in² more, every pass twice, and
              twice the statistics and hidden states
  solve       the products that the solver declares, at the float32 rate, and a·in² + b·out·in, both from the solver itself timed
              on two small layers
  measure     of every linear's answer, rounding to nearest and weight 1.1·out·in² flops in the metric of calibration and
              2·out·in at every held-out token (at most HELDOUT_TOKENS), at the float32 rate
  learn       4·2·parameters flops a token and epoch (forward, backward, the loss at the end of the epoch), 5 with an
              attention loss, and one pass for the targets; the steps of --whole_model and --rotate-steps as those of tune
  saliency    2·parameters flops a token forward, again in the backward pass, and for every draw; the R Gram matrices of
              every linear are in gram
  tune        2·parameters flops a token forward and 4 backward in every step (2 more with --tune-recompute), 2 in every
              validation, times 2 for all that is no matrix product
  head        with --head-bits one pass of the calibration windows through the blocks, its Gram matrix, and the time of solving
              and of measuring
  mixtures    the passes meet the parameters that a token is routed to; of experts all are solved, and their Gram matrices are
              summed over the tokens of each, besides one over all tokens; their inner values are computed once more
  evaluate    two passes (full precision and quantized) over EVAL_TOKENS a data set, of a file its bytes over BYTES_A_TOKEN,
              or --limit windows if that is less, and LOGIT_PASSES over the logits
The rates come from a fraction of a second of work; on SmolLM2 all of a run came within a third of its plan
(benchmarks/results/planned.md), elsewhere expect a factor of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import demo
from data.corpora import is_file
from models import family_for
from models.gguf_facts import check_config
from quant.blocks.backward import HEAD_ELEMENTS
from quant.core.env import pick_device
from quant.core.names import DEQUANTIZED, FULL_BITS, GGUF
from quant.evaluate import passes
from quant.export.formats import Content
from quant.learn.flatquant import numbers_beside
from quant.learn.rotation import check_rotation
from quant.learn.transforms import check_seams
from quant.run.config import DEFAULT_MAX_SEQLEN, RunConfig, SessionConfig
from quant.run.content import PART, candidate_widths, check_format, content_of, expected_bits, outside_matrices
from quant.run.experts import check_mixture
from quant.run.plan_calibration import (
    between,
    calibration_cost,
    gram_flops,
    measuring_cost,
    measuring_seconds,
    uses_cross,
)
from quant.run.rates import Rates, SolverCost
from quant.run.request import Request
from quant.run.shapes import Kind, Shapes
from quant.run.statistics import HELDOUT_TOKENS
from quant.solvers import declaration_of, with_defaults
from quant.tune.config import Tuning, batch_of
from quant.tune.limits import OVERHEAD, Sizes, learning_memory, memory
from quant.tune.limits import flops as tuning_flops

EVAL_TOKENS = 300_000  # about WikiText-2's test split
LOGIT_PASSES = 12  # over the logits: their logarithms of both models, the loss and the divergence
BYTES_A_TOKEN = 4.0  # of English, by vocabularies of 30 thousand words and more


def estimate(request: Request, shapes: Shapes, itemsize: int, rates: Rates, cost: SolverCost) -> dict[str, float]:
    """Bytes and seconds of a run; see the module's text for the formulas."""
    run, session = request.run, request.session
    seqlen = session.seqlen or min(shapes.max_length, DEFAULT_MAX_SEQLEN)
    n_blocks, tokens = min(run.num_layers, shapes.n_blocks), run.windows * seqlen
    beside = 1 + (run.target_correction > 0 or uses_cross(run))  # models that calibration runs through
    device = pick_device(session.device)
    statistics, forward, gram = calibration_cost(run, shapes, tokens, beside, rates, itemsize, device)
    blocks = list(shapes.first(n_blocks))
    workspace = max(solver_bytes(run, out, n_in) for _, out, n_in in shapes.linears)
    widest = max(max(out, n_in) for _, out, n_in in shapes.linears)
    batch = session.calib_batch * seqlen * (8 * shapes.hidden + 3 * widest) * itemsize
    weights = sum(kind.weights * count for kind, count in blocks)
    stored, times = _stored_bits(run, shapes, n_blocks)
    solve = times * sum(count * _solving(kind, cost) for kind, count in blocks)
    measure = sum(count * measuring_cost(run, kind, seqlen, beside, rates) for kind, count in blocks)
    learn, learning = _learning(run, shapes, tokens, seqlen, itemsize)
    pass_flops, graph = _saliency(run, session.calib_batch, shapes, tokens, seqlen, itemsize)
    tune, tuning = tuning_cost(run, shapes, seqlen, itemsize)
    ends, beyond = outside_cost(run, shapes, tokens, beside, rates, cost)
    behind, evaluate = _evaluating(session, shapes, seqlen, itemsize, rates)
    trained = (learn + pass_flops + tune) / rates.products
    return {
        "device bytes: block": shapes.block * itemsize,
        "device bytes: statistics": statistics,
        "device bytes: solver": workspace,
        "device bytes: batch": batch,
        **({"device bytes: learning": learning} if learn else {}),
        **({"device bytes: saliency": graph} if run.saliency else {}),
        **({"device bytes: tuning": tuning} if run.tuning else {}),
        **({"device bytes: head and embedding": ends} if run.beyond_blocks else {}),
        "device bytes: peak": max(
            shapes.block * itemsize + max(statistics + workspace, statistics + batch, learning, graph),
            shapes.outside * itemsize + max(batch, graph, behind, ends),
            tuning,
        ),
        f"{'disk' if session.activation_store == 'disk' else 'host'} bytes: hidden states": tokens
        * shapes.hidden
        * itemsize
        * (run.hidden_states(shapes.n_blocks) + beside - 1 + beside * any(kind.routed for kind, _ in blocks)),
        **({"host bytes: next block": shapes.block * itemsize} if device.type == "cuda" else {}),
        "disk bytes: run directory": weights,
        "disk bytes: checkpoint": shapes.parameters * 2 if request.output.save else 0,
        "quantized bytes": stored / 8,
        "bits per weight": stored / weights,
        "bits per weight, whole model": _whole_bits(run, shapes, stored),
        "seconds: forward": forward,
        "seconds: gram": gram,
        "seconds: solve": solve,
        "seconds: measure": measure,
        **({"seconds: learn": learn / rates.products} if learn else {}),
        **({"seconds: saliency": pass_flops / rates.products} if run.saliency else {}),
        **({"seconds: tune": tune / rates.products} if run.tuning else {}),
        **({"seconds: head and embedding": beyond} if run.beyond_blocks else {}),
        "seconds: evaluate": evaluate,
        "seconds: total": forward + gram + solve + measure + beyond + evaluate + trained,
    }


def _evaluating(session: SessionConfig, shapes: Shapes, seqlen: int, itemsize: int, rates: Rates) -> tuple[int, float]:
    """Bytes behind the head, and seconds, of the passes that evaluate texts."""
    texts = [_tokens_of(name, session.limit, seqlen) for name in session.eval_datasets]
    tokens = sum(texts) * (2 if session.full_precision_eval else 1)
    seconds = tokens * (2 * shapes.active / rates.products + 4 * LOGIT_PASSES * shapes.vocabulary / rates.copied)
    seconds += tokens * shapes.n_blocks * between(shapes, seqlen, itemsize, rates)
    return _logits(shapes.vocabulary, seqlen, int(max(texts))) if tokens else 0, seconds


def with_process(plan: dict[str, float], shapes: Shapes, itemsize: int, resident: int) -> dict[str, float]:
    """An estimate for a CPU with the bytes of the whole process. itemsize: of the checkpoint's numbers; resident: bytes that a
    process has before it begins."""
    whole = (
        resident
        + plan["device bytes: peak"]
        + plan.get("host bytes: hidden states", 0.0)
        + shapes.parameters * itemsize
    )
    answer = {}
    for key, value in plan.items():
        if key == "disk bytes: run directory":
            answer["host bytes: process"] = whole
        answer[key] = value
    return answer


def _tokens_of(source: str, limit: int | None, seqlen: int) -> float:
    """Tokens of a text that is evaluated on, as far as is known without a tokenizer."""
    known = float(EVAL_TOKENS)
    if source == "demo":
        known = len(demo.text("test")) / BYTES_A_TOKEN
    elif is_file(source) and Path(source).is_file():
        known = Path(source).stat().st_size / BYTES_A_TOKEN
    return known if limit is None else min(known, limit * seqlen)


def _stored_bits(run: RunConfig, shapes: Shapes, n_blocks: int) -> tuple[float, int]:
    """Bits that the linears of the first blocks and what is beside them take, and how many times a linear is solved."""
    blocks = list(shapes.first(n_blocks))
    weights = sum(kind.weights * count for kind, count in blocks)
    stored, times = 16.0 * weights, 1
    if run.avg_bits is not None:  # at most; all candidates are solved once before
        stored, times = run.avg_bits * weights, 1 + len(candidate_widths(run, shapes.kinds[-1].shapes))
    elif run.wbits != FULL_BITS:
        stored = sum(count * expected_bits(run, kind.shapes) for kind, count in blocks)
    return stored + 16 * n_blocks * _online_numbers(run, shapes), times


def _solving(kind: Kind, cost: SolverCost) -> float:
    """Seconds of the solver for the linears of one block."""
    return sum(cost.seconds(out, n_in) for _, out, n_in in kind.linears)


def _logits(vocabulary: int, seqlen: int, tokens: int) -> int:
    """Bytes that evaluation holds behind the head, of ``tokens`` in windows."""
    if not vocabulary:
        return 0
    window = seqlen * vocabulary
    if window > passes.HEAD_ELEMENTS:
        return passes.HELD_LOGITS * 4 * passes.tokens_at_a_time(vocabulary) * vocabulary
    return passes.HELD_LOGITS * 4 * min(passes.HEAD_ELEMENTS // window, -(-tokens // seqlen)) * window


def outside_cost(
    run: RunConfig, shapes: Shapes, tokens: int, beside: int, rates: Rates, cost: SolverCost
) -> tuple[float, float]:
    """Bytes on the device, and seconds, that head and embedding take to be quantized; see the module's text."""
    most = seconds = 0.0
    for matrix in outside_matrices(run, shapes.ends).values():
        rows, n_in = matrix.shape
        part = rows if declaration_of(run.solver).rows_coupled else min(rows, -(-PART // n_in))
        most = max(most, 4.0 * n_in**2 * beside + solver_bytes(run, part, n_in))
        if matrix.multiplied:
            seconds += beside * tokens * 2 * sum(kind.active for kind in shapes.kinds) / rates.products
            seconds += tokens * (gram_flops(n_in) + 2 * (beside - 1) * n_in**2) / rates.float32
            more = -(-rows // part) - 1  # parts, with a factor each
            seconds += cost.seconds(rows, n_in) + more * cost.seconds(0, n_in)
            seconds += measuring_seconds(rows, n_in, HELDOUT_TOKENS, beside, rates)
    return most, seconds


def _whole_bits(run: RunConfig, shapes: Shapes, in_blocks: float) -> float:
    """Bits of a weight of the whole model. in_blocks: of all linears that are quantized; the rest has 16, as most
    checkpoints keep it."""
    weights = sum(kind.weights * count for kind, count in shapes.first(run.num_layers))
    bits, count = in_blocks, shapes.parameters
    for name, matrix in outside_matrices(run, shapes.ends).items():
        bits += expected_bits(replace(run, levels=None), {name: matrix.shape}, matrix.bits)
        weights += matrix.shape[0] * matrix.shape[1]
    return (bits + 16.0 * (count - weights)) / count


def _online_numbers(run: RunConfig, shapes: Shapes) -> int:
    """How many numbers of a block learning leaves beside its weights."""
    if run.learning is None:
        return 0
    inputs = {tuple(name for name, _, _ in group): group[0][2] for group in shapes.groups}
    in_front = numbers_beside(run.learning, inputs, shapes.output, shapes.heads, shapes.head_dim)
    return in_front + (shapes.norms * shapes.hidden**2 if run.learning.transform.norm_matrix else 0)


def solver_bytes(run: RunConfig, n_out: int, n_in: int) -> float:
    """Bytes of the largest phase of solving one linear, without its Gram matrix; see the module's text."""
    measuring = (3.25 if run.group_size == -1 else 5.25) * 4.0 * n_out * n_in
    return max(
        measuring,
        declaration_of(run.solver).workspace(n_out, n_in, with_defaults(run.solver, run.options), run.group_size),
    )


def _learning(run: RunConfig, shapes: Shapes, tokens: int, seqlen: int, itemsize: int) -> tuple[float, float]:
    """flops of all blocks, and bytes on the device, that learning takes: of rotations, and of blocks."""
    learning = run.learning
    turn, turning = _together(run, shapes, run.rotation.steps if run.rotation else 0, seqlen, itemsize)
    if learning is None:
        return turn, turning
    passes = 1 + learning.augmented + learning.epochs * (5 if learning.attention else 4)
    kept = _graph_bytes(shapes, learning.batch, seqlen, itemsize)
    flops = min(run.num_layers, shapes.n_blocks) * tokens * 2.0 * shapes.block * passes
    more, whole = _together(run, shapes, learning.together, seqlen, itemsize)
    return turn + flops + more, max(24 * shapes.block + kept, whole, turning)


def _together(run: RunConfig, shapes: Shapes, steps: int, seqlen: int, itemsize: int) -> tuple[float, float]:
    """flops of so many steps through all blocks, with what they take besides matrix products as so many more, and bytes on
    the device where blocks keep their inputs alone."""
    if not steps:
        return 0.0, 0.0
    sizes, batch = _sizes(run, shapes), batch_of(run.windows)
    work = tuning_flops(sizes, Tuning("model", steps, recompute=True), run.windows, seqlen)
    return OVERHEAD * work, learning_memory(sizes, batch * seqlen, shapes.heads * seqlen, itemsize, recompute=True)


def _saliency(
    run: RunConfig, batch: int, shapes: Shapes, tokens: int, seqlen: int, itemsize: int
) -> tuple[float, float]:
    """flops of the backward pass, and bytes on the device that it takes beside a block."""
    labels = run.gradient_labels
    if labels is None:
        return 0.0, 0.0
    blocks = 2.0 * shapes.block * shapes.n_blocks * (2 + labels.count)
    kept = _graph_bytes(shapes, batch, seqlen, itemsize)
    logits = min(HEAD_ELEMENTS, batch * seqlen * shapes.outside / shapes.hidden)
    return tokens * (blocks + 2.0 * shapes.outside * (1 + labels.count)), max(kept, 20 * logits)


def _graph_bytes(shapes: Shapes, batch: int, seqlen: int, itemsize: int) -> float:
    """Bytes that a block keeps of so many windows for its gradients (Korthikanti et al. 2022, equation 2)."""
    return batch * seqlen * (17 * shapes.hidden + 2.5 * shapes.heads * seqlen) * itemsize


def tuning_cost(run: RunConfig, shapes: Shapes, seqlen: int, itemsize: int) -> tuple[float, float]:
    """flops of tuning, with what it takes besides matrix products as so many more, and bytes on the device."""
    if run.tuning is None:
        return 0.0, 0.0
    sizes = _sizes(run, shapes)
    work = tuning_flops(sizes, run.tuning, run.windows, seqlen)
    return OVERHEAD * work, memory(sizes, run.tuning, itemsize, batch_of(run.windows) * seqlen)


def _sizes(run: RunConfig, shapes: Shapes) -> Sizes:
    weights = [out * n_in for _, out, n_in in shapes.linears]
    return Sizes(
        sum(weights), shapes.block, min(run.num_layers, shapes.n_blocks), shapes.n_blocks, shapes.outside, shapes.hidden,
        shapes.vocabulary, max(weights),
    )  # fmt: skip


def check_contents(requests: Sequence[Request], shapes: Shapes, model_config: Any) -> list[tuple[str, Content]]:
    """Format and content of a checkpoint of every run that quantizes. Raises InputError where `Session` would: for seams
    that are not there, groups that do not divide, and formats that are to be written."""
    named = {name: (out, n_in) for name, out, n_in in shapes.linears}
    contents = []
    for run, output in ((r.run, r.output) for r in requests if r.run.quantizes):
        check_mixture(family_for(model_config), model_config, run)
        if run.learning is not None:
            check_seams(family_for(model_config), model_config, run.learning.transform)
        if run.rotation is not None:
            check_rotation(family_for(model_config), model_config, run.rotation)
        content = content_of(run, named, shapes.n_blocks, model_config.model_type, shapes.ends)
        if output.save is not None or output.target is not None or output.format != DEQUANTIZED:
            check_format(output, content)
        if output.format == GGUF:
            check_config(model_config, family_for(model_config).heads(model_config))
        contents.append((output.format, content))
    return contents
