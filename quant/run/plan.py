"""`--dry-run`: what a run would take, from the model's configuration and rates measured on this machine.

Memory (bytes)
  block       parameters of a block x bytes of the arithmetic's dtype
  statistics  4·in² for every Gram matrix alive: all groups of a block, or the largest with --true-sequential
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
              two of them, one more for --aug_loss and one for an attention loss; tuning one more, a window of blocks two
Time (seconds)
  calibrate   2·parameters of a block flops a token for each pass (one observes, one advances; with
              --true-sequential one partial pass a group), at the measured matrix-product rate of the dtype;
              Gram (1 + 1/b)·in² flops a token and group for in columns in b blocks, at the float32 rate; with the
              original model's inputs beside (--target-correction, gptaq, qronos) 2·in² more, every pass twice, and
              twice the statistics and hidden states
  solve       out·(a·in + b·in²), a and b from the solver itself timed on two small layers
  learn       4·2·parameters flops a token and epoch (forward, backward, the loss at the end of the epoch), 5 with an
              attention loss, and one pass for the targets; the steps of --whole_model and --rotate-steps as those of tune
  saliency    2·parameters flops a token forward, again in the backward pass, and for every draw; the R Gram matrices of
              every linear are in gram
  tune        2·parameters flops a token forward and 4 backward in every step (2 more with --tune-recompute), 2 in every
              validation, times 2 for all that is no matrix product
  head        with --head-bits one pass of the calibration windows through the blocks, its Gram matrix, and the solver's time
  evaluate    two passes (full precision and quantized) over EVAL_TOKENS a data set, or --limit windows
The rates come from a fraction of a second of work; expect the estimate within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models import family_for
from models.gguf_facts import check_config
from models.load import build_meta
from models.vocabulary import Vocabulary, vocabulary_of
from quant.blocks.backward import HEAD_ELEMENTS
from quant.core.gram import BLOCK, GramStats
from quant.core.names import DEQUANTIZED, FULL_BITS, GGUF
from quant.core.types import QuantSpec
from quant.evaluate import passes
from quant.export.formats import Content
from quant.learn.flatquant import numbers_beside
from quant.learn.rotation import check_rotation
from quant.learn.transforms import check_seams
from quant.run.config import DEFAULT_MAX_SEQLEN, RunConfig
from quant.run.content import PART, candidate_widths, check_format, content_of, expected_bits, outside_matrices
from quant.run.request import Request
from quant.solvers import declaration_of, get_solver, with_defaults
from quant.tune.config import Tuning, batch_of
from quant.tune.limits import OVERHEAD, Sizes, learning_memory, memory
from quant.tune.limits import flops as tuning_flops

EVAL_TOKENS = 300_000  # about WikiText-2's test split
SAMPLES = (512, 1024)  # inputs of the two layers that a solver is timed on
SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model: blocks, parameters of one block and outside, linears as groups of (name, out, in), norms of a
    block that a matrix may stand behind, the linear behind the heads, and the size of one."""

    n_blocks: int
    block: int
    outside: int
    hidden: int
    max_length: int
    groups: list[list[tuple[str, int, int]]]
    heads: int = 1
    norms: int = 0
    vocabulary: int = 0
    output: str = ""
    head_dim: int = 0
    ends: Vocabulary | None = None

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """All linears of a block."""
        return [linear for group in self.groups for linear in group]


def shapes_of(config: Any, trust_remote_code: bool = False) -> Shapes:
    """Sizes from a configuration alone; no weights are needed."""
    family = family_for(config)
    module = build_meta(config, torch.float32, trust_remote_code)
    blocks = module.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    modules = dict(blocks[0].named_modules())
    groups = [
        [(name, modules[name].out_features, modules[name].in_features) for name in group]
        for group in family.groups(config)
    ]
    per_block = sum(p.numel() for p in blocks[0].parameters())
    outside = sum(p.numel() for p in module.parameters()) - per_block * len(blocks)
    longest = int(getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_SEQLEN)
    layout = family.heads(config)
    heads, head_dim = layout.q[1].shape
    norms = sum(seam.kind == "norm" for seam in family.seams(config))
    return Shapes(
        len(blocks), per_block, outside, config.hidden_size, longest, groups, heads, norms, config.vocab_size,
        layout.output, head_dim, vocabulary_of(module),
    )  # fmt: skip


def product_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """flop/s of matrix products on this machine, in the arithmetic's dtype and in float32."""
    size = 2048 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    half = a.to(dtype)
    return 2 * size**3 / _seconds(lambda: half @ half, device), 2 * size**3 / _seconds(lambda: a @ a, device)


def solver_cost(device: torch.device, run: RunConfig) -> tuple[float, float]:
    """(a, b): the solver takes out·(a·in + b·in²) seconds on this machine."""
    if run.wbits == FULL_BITS:
        return 0.0, 0.0
    solver = get_solver(run.solver)
    spec = QuantSpec(run.wbits, -1, run.symmetric, run.range, run.levels, run.grid_kind)
    seconds = []
    for n_in in SAMPLES:
        stats = GramStats(n_in, device)
        x = torch.randn(2 * n_in, n_in, device=device)
        stats.update(x, x)
        weight = torch.randn(SAMPLE_ROWS, n_in, device=device)
        work = partial(solver, weight, stats, spec, **run.options)
        seconds.append(_seconds(work, device, repeats=1))
    (p, r), (t, u) = SAMPLES, (x / SAMPLE_ROWS for x in seconds)
    b = max(0.0, (u / r - t / p) / (r - p))
    return max(0.0, t / p - b * p), b


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Best of a few runs, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        result = work()
        if isinstance(result, Tensor):
            result.flatten()[0].item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def estimate(
    request: Request, shapes: Shapes, itemsize: int, rates: tuple[float, float], cost: tuple[float, float]
) -> dict[str, float]:
    """Bytes and seconds of a run; see the module's text for the formulas."""
    run, session = request.run, request.session
    seqlen = session.seqlen or min(shapes.max_length, DEFAULT_MAX_SEQLEN)
    n_blocks, tokens = min(run.num_layers, shapes.n_blocks), run.windows * seqlen
    beside = 1 + (run.target_correction > 0 or _uses_cross(run))  # models that calibration runs through
    statistics, forward, gram = _calibration(run, shapes, tokens, beside, rates)
    workspace = max(solver_bytes(run, out, n_in) for _, out, n_in in shapes.linears)
    widest = max(max(out, n_in) for _, out, n_in in shapes.linears)
    batch = session.calib_batch * seqlen * (8 * shapes.hidden + 3 * widest) * itemsize
    weights = sum(out * n_in for _, out, n_in in shapes.linears)
    stored, times = _stored_bits(run, shapes)
    solve = times * n_blocks * sum(out * (cost[0] * n_in + cost[1] * n_in**2) for _, out, n_in in shapes.linears)
    learn, learning = _learning(run, shapes, tokens, seqlen, itemsize)
    pass_flops, graph = _saliency(run, session.calib_batch, shapes, tokens, seqlen, itemsize)
    tune, tuning = tuning_cost(run, shapes, seqlen, itemsize)
    windows = EVAL_TOKENS if session.limit is None else min(EVAL_TOKENS, session.limit * seqlen)
    evaluated = windows * len(session.eval_datasets) * (2 if session.full_precision_eval else 1)
    ends, beyond = outside_cost(run, shapes, tokens, beside, rates, cost)
    total_parameters = shapes.outside + shapes.block * shapes.n_blocks
    evaluate = evaluated * 2 * total_parameters / rates[0]
    behind = _logits(shapes.vocabulary, seqlen, windows) if evaluated else 0
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
        * (run.hidden_states(shapes.n_blocks) + beside - 1),
        "disk bytes: run directory": n_blocks * weights,
        "disk bytes: checkpoint": total_parameters * 2 if request.output.save else 0,
        "quantized bytes": n_blocks * stored / 8,
        "bits per weight": stored / weights,
        "bits per weight, whole model": _whole_bits(run, shapes, n_blocks * stored),
        "seconds: forward": forward,
        "seconds: gram": gram,
        "seconds: solve": solve,
        **({"seconds: learn": learn / rates[0]} if learn else {}),
        **({"seconds: saliency": pass_flops / rates[0]} if run.saliency else {}),
        **({"seconds: tune": tune / rates[0]} if run.tuning else {}),
        **({"seconds: head and embedding": beyond} if run.beyond_blocks else {}),
        "seconds: evaluate": evaluate,
        "seconds: total": forward + gram + solve + beyond + evaluate + (learn + pass_flops + tune) / rates[0],
    }


def _stored_bits(run: RunConfig, shapes: Shapes) -> tuple[float, int]:
    """Bits that a block's linears and what is beside them take, and how many times a linear is solved."""
    weights = sum(out * n_in for _, out, n_in in shapes.linears)
    named = {name: (out, n_in) for name, out, n_in in shapes.linears}
    stored, times = 16.0 * weights, 1
    if run.avg_bits is not None:  # at most; all candidates are solved once before
        stored, times = run.avg_bits * weights, 1 + len(candidate_widths(run, named))
    elif run.wbits != FULL_BITS:
        stored = expected_bits(run, named)
    return stored + 16 * _online_numbers(run, shapes), times


def _logits(vocabulary: int, seqlen: int, tokens: int) -> int:
    """Bytes that evaluation holds behind the head, of ``tokens`` in windows."""
    if not vocabulary:
        return 0
    window = seqlen * vocabulary
    if window > passes.HEAD_ELEMENTS:
        return passes.HELD_LOGITS * 4 * passes.tokens_at_a_time(vocabulary) * vocabulary
    return passes.HELD_LOGITS * 4 * min(passes.HEAD_ELEMENTS // window, -(-tokens // seqlen)) * window


def outside_cost(
    run: RunConfig, shapes: Shapes, tokens: int, beside: int, rates: tuple[float, float], cost: tuple[float, float]
) -> tuple[float, float]:
    """Bytes on the device, and seconds, that head and embedding take to be quantized; see the module's text."""
    most = seconds = 0.0
    for matrix in outside_matrices(run, shapes.ends).values():
        rows, n_in = matrix.shape
        part = rows if declaration_of(run.solver).rows_coupled else min(rows, -(-PART // n_in))
        most = max(most, 4.0 * n_in**2 * beside + solver_bytes(run, part, n_in))
        if matrix.multiplied:
            seconds += beside * tokens * 2 * shapes.block * shapes.n_blocks / rates[0]
            seconds += tokens * (_gram_flops(n_in) + 2 * (beside - 1) * n_in**2) / rates[1]
            seconds += rows * (cost[0] * n_in + cost[1] * n_in**2)
    return most, seconds


def _whole_bits(run: RunConfig, shapes: Shapes, in_blocks: float) -> float:
    """Bits of a weight of the whole model. in_blocks: of all linears that are quantized; the rest has 16, as most
    checkpoints keep it."""
    weights = min(run.num_layers, shapes.n_blocks) * sum(out * n_in for _, out, n_in in shapes.linears)
    bits, count = in_blocks, shapes.outside + shapes.block * shapes.n_blocks
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


def _calibration(
    run: RunConfig, shapes: Shapes, tokens: int, beside: int, rates: tuple[float, float]
) -> tuple[float, float, float]:
    """Bytes of the statistics, and seconds of the blocks' passes and of the sums. beside: models that calibration runs
    through."""
    n_blocks = min(run.num_layers, shapes.n_blocks)
    matrices = [1 + run.saliency * len(group) for group in shapes.groups]
    grams = [4 * group[0][2] ** 2 * n for group, n in zip(shapes.groups, matrices, strict=True)]
    sizes = [sum(out * n_in for _, out, n_in in group) for group in shapes.groups]
    before = [sum(sizes[:i]) / sum(sizes) for i in range(len(sizes))]  # share of the block in front of each group
    passes = 1 + (sum(before) if run.true_sequential else 1)
    products = (
        n * (_gram_flops(group[0][2]) + 2 * (beside - 1) * group[0][2] ** 2)
        for group, n in zip(shapes.groups, matrices, strict=True)
    )
    return (
        beside * (max(grams) if run.true_sequential else sum(grams)),
        beside * n_blocks * tokens * 2 * shapes.block * passes / rates[0],
        n_blocks * tokens * sum(products) / rates[1],
    )


def _uses_cross(run: RunConfig) -> bool:
    return run.wbits != FULL_BITS and declaration_of(run.solver).uses_cross


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


def _gram_flops(n_in: int) -> float:
    blocks = -(-n_in // BLOCK)
    return n_in**2 * (1 + 1 / blocks)


def check_contents(requests: Sequence[Request], shapes: Shapes, model_config: Any) -> list[tuple[str, Content]]:
    """Format and content of a checkpoint of every run that quantizes. Raises InputError where `Session` would: for seams
    that are not there, groups that do not divide, and formats that are to be written."""
    named = {name: (out, n_in) for name, out, n_in in shapes.linears}
    contents = []
    for run, output in ((r.run, r.output) for r in requests if r.run.quantizes):
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
