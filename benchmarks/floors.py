"""Where the seconds of a run go, part by part, each against its floor: its products at the rate that this machine has at
their shapes, its bytes at the rate of a copy, both measured in the same process behind the run.

    python -m benchmarks.floors --model SMOLLM2 --flags "--quantization-method gptq" --out benchmarks/results/floors.md
    python -m benchmarks.floors --blocks 8                       # random weights in the shapes of SmolLM2-135M
    python -m benchmarks.floors --model models/demo/llama --cpu  # seconds of this process, where others use the cores

Every second is in one part; what is in none is "rest". linears: products with the weights of blocks. attention: its modules
without their linears; the floor is both products of the heads' lower triangles. between: all else of a pass through a block;
the floor reads and writes what norms and activations take and give, and what is added to the stream. Gram: sums over inputs. solving: the
solvers alone. errors, rank: what the journal says of an answer and of its inputs. losses: behind the head, of both models.
A floor counts passes and products as they were done, so that work which need not be done is not seen in a ratio. Rates are
the best of a few runs, seconds of a run are not: some of a ratio is that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.clock import REST, Clock, Done, Place, Work
from benchmarks.measuring import about, flags, machine_line, report, show, table, write
from benchmarks.planned import random_model
from model_quantizer import request_from
from models.load import LazyModel
from quant.blocks.stream import BlockStream
from quant.core import env
from quant.core.gram import GramStats
from quant.core.sample import InputSample
from quant.evaluate import perplexity
from quant.run import loop, quantize, run, scoring, solving
from quant.run.directory import RunDirectory
from quant.run.plan_calibration import gram_flops
from quant.run.request import Request
from quant.run.session import Session, open_session
from quant.solvers import with_defaults

SHAPES = Path(__file__).parent / "configs" / "smollm2-135m"
STAGES = ("calibration", "evaluation")
DATA = "--dataset demo --eval-datasets demo --nsamples 8 --seqlen 512 --limit 8"
PARTS = ("linears", "attention", "between", "embedding", "head", "losses", "Gram", "solving", "errors", "rank", "reading",
         "codes on disk", "codes in place", "windows", REST)  # fmt: skip


def main() -> None:
    """Run, measure the rates, print."""
    parser = flags(__doc__, "cpu")
    parser.add_argument("--model", help="a checkpoint (default: random weights in the shapes of SmolLM2-135M)")
    parser.add_argument("--blocks", type=int, default=30, help="of the random one")
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--grid", default="--wbits 4 --group-size 64")
    parser.add_argument("--flags", default="--quantization-method gptq", help="method and what belongs to it")
    parser.add_argument("--cpu", action="store_true", help="seconds that this process computes, on one thread")
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = args.model or str(random_model(SHAPES, Path(name) / SHAPES.name, args.blocks))
        words = ["--model", model, *args.data.split(), *args.grid.split(), *args.flags.split(), "--device", args.device]
        clock = timed_run(request_from([*words, "--run-dir", f"{name}/run"]), args.cpu)
    machine = machine_line(env.describe(clock.device), env.versions())
    seconds = "seconds in which the process computed" if args.cpu else "seconds"
    asked = f"{Path(model).name}; `{args.data} {args.grid} {args.flags}`; {seconds}."
    head = ["# A run against its floors", "", f"{machine}.", "", about(__doc__), "", asked, ""]
    lines = report(head, rows(clock), args.out)
    lines += ["", f"Copy: {clock.copied / 1e9:.1f} GB/s, read and written.", "", *table(rates(clock))]
    show(*lines[-len(lines) :])
    write(lines, args.out)


def timed_run(request: Request, cpu: bool = False) -> Clock:
    """One run from the model on disk to its results, by the clock."""
    clock = Clock(env.pick_device(request.session.device), cpu)
    with clock.within("opening"):
        session = open_session(request)
    with watched(clock, session, request):
        session.run(request.run, replace(request.output, overwrite=True))
    clock.stop()
    return clock


@contextmanager
def watched(clock: Clock, session: Session, request: Request) -> Iterator[None]:
    """For the length of a `with`, what a run calls is a part of the clock."""
    timed, options = clock.timed, with_defaults(request.run.solver, request.run.options)
    vocabulary, solver = session.model.config.vocab_size, request.run.solver
    places: list[tuple[Any, str, str, Any]] = [
        (loop, "calibration_stream", "windows", None),
        (LazyModel, "block_weights", "reading", lambda weights, *_: copied(2 * bytes_of(weights))),
        (LazyModel, "outside_weights", "reading", lambda weights, *_: copied(2 * bytes_of(weights))),
        (BlockStream, "run", "between", None),
        (BlockStream, "call", "between", lambda out, *_: copied(6 * out.nbytes)),  # two sums: two read, one written
        (BlockStream, "capture", "embedding", lambda stream, *_: copied(2 * stream.hidden.data.nbytes)),
        (BlockStream, "logits", "head", None),
        (perplexity, "_losses", "losses", partial(of_losses, vocabulary)),
        (GramStats, "update", "Gram", of_gram),
        (InputSample, "update", "errors", None),
        (solving, "solve", "solving", partial(of_solver, solver, options)),
        (solving, "told", "errors", of_errors),
        (GramStats, "_sampled_rank", "rank", None),
        (RunDirectory, "write_block", "codes on disk", lambda _, target, index, own, *a, **k: copied(2 * codes(own))),
        (RunDirectory, "read_weights", "codes on disk", lambda own, *_: copied(2 * codes(own))),
        (RunDirectory, "read_changed", "codes on disk", None),
        *((module, "deploy", "codes in place", of_deploying) for module in (loop, quantize, scoring)),
    ]
    with ExitStack() as stack:
        for owner, name, part, work in places:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part, work)))
        for name, stage in (("quantize", "calibration"), ("score", "evaluation")):
            stack.enter_context(patch.object(run, name, timed(getattr(run, name), REST, stage=stage)))
        for kind, part, work, inside in modules(session.model):
            stack.enter_context(patch.object(kind, "forward", timed(kind.forward, part, work, inside=inside)))
        handles = [count_attention(clock, session.model, block) for block in session.model.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def modules(model: LazyModel) -> Iterator[tuple[Any, str, Any, tuple[str, ...]]]:
    """Classes of modules whose calls are parts: linears, attention, and of the rest of a block what has no modules in it."""
    attention = model.family.heads(model.config).output.rpartition(".")[0]
    around = {type(block.get_submodule(attention)) for block in model.blocks}
    yield nn.Linear, "linears", of_linear, ("head",)
    for kind in around:
        yield kind, "attention", None, ()
    leaves = {type(m) for block in model.blocks for m in block.modules() if not list(m.children())}
    for kind in leaves - around - {nn.Linear}:
        yield kind, "between", of_module, ("head", "attention", "embedding")


def count_attention(clock: Clock, model: LazyModel, block: nn.Module) -> Any:
    """Count the products of a block's heads whenever they were made: when what they write is multiplied."""
    layout = model.family.heads(model.config)
    heads, size = layout.q[1].shape

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        windows, length = args[0].numel() // (args[0].shape[-2] * args[0].shape[-1]), args[0].shape[-2]
        half, dtype = windows * heads / 2, args[0].dtype
        clock.add((Work("product", (length, size, length), dtype), half), (Work("product", (length, length, size), dtype), half))  # fmt: skip

    return block.get_submodule(layout.output).register_forward_pre_hook(see)


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """All of them."""
    return sum(tensor.nbytes for tensor in tensors.values())


def codes(answers: Mapping[str, Any]) -> int:
    """Bytes of the codes of some linears."""
    return sum(answer.codes.nbytes for answer in answers.values())


def copied(size: float) -> Done:
    """So many bytes, read or written."""
    return [(Work("copy"), size)]


def of_linear(out: Tensor, module: nn.Module, x: Tensor) -> Done:
    """One product."""
    return [(Work("linear", (x.numel() // x.shape[-1], out.shape[-1], x.shape[-1]), x.dtype), 1)]


def of_module(out: Any, module: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Done:
    """A norm or an activation, which reads its input and writes as much."""
    return copied(x.nbytes + out.nbytes) if isinstance(x, Tensor) and isinstance(out, Tensor) else []


def of_losses(vocabulary: int, losses: Mapping[str, tuple[Tensor, ...]], *args: Any) -> Done:
    """Logits are read and their logarithms written; where models are compared, those of both are read."""
    return copied(4 * vocabulary * sum(own[0].numel() * (2 if len(own) == 1 else 4) for own in losses.values()))


def of_gram(_: None, stats: GramStats, x: Tensor, full: Tensor | None = None, *args: Any, **kwargs: Any) -> Done:
    """The sum over these inputs, half of which is its transpose; with the original's, all of theirs."""
    tokens, n_in = x.numel() // x.shape[-1], x.shape[-1]
    return [(Work("gram", (tokens, n_in)), gram_flops(n_in) / (2 * n_in**2) + (full is not None))]


def of_solver(name: str, options: Mapping[str, Any], answer: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Done:
    """The products of a method for one linear, as in benchmarks/solvers.py. Of a method that has no line here, none."""
    n_out, n_in = weight.shape
    sweep = Work("sweep", (n_out, n_in))
    half = [(sweep, 0.5), (Work("cholesky", (n_in,)), 1.0)]  # GPTQ: what is behind a block
    square = Work("product", (n_in, n_in, n_in))
    whole = Work("product", (n_out, n_in, n_in))
    return {
        "rtn": [(Work("copy"), 5.0 * n_out * n_in)],
        "gptq": half, "spqr": half,
        "qronos": [*half, (Work("cholesky", (n_in,)), 1.0), (whole, 1.0)],
        "gptaq": [*half, (sweep, 0.5), (square, 7 / 3)],
        "quantease": [(sweep, float(options.get("num_iter", 0)))],
        "gptq_quantease": [*half, (sweep, float(options.get("num_iter", 0))), (whole, 3.0)],
    }.get(name, [])  # fmt: skip


def of_errors(answer: Any, problem: Any, *args: Any, **kwargs: Any) -> Done:
    """Outputs of the weight, of the answer's error and of that of rounding to nearest: in the metric of calibration, of whose
    symmetric matrix half is needed, and at the inputs that were kept."""
    n_out, n_in = problem.weight.shape
    done = [(Work("product", (n_out, n_in, n_in)), 1.5)]
    if problem.inputs.heldout is not None:
        done.append((Work("linear", (len(problem.inputs.heldout.inputs), n_out, n_in)), 3.0))
    return done


def of_deploying(weights: Any, before: Any, solved: Mapping[str, Any], *args: Any, **kwargs: Any) -> Done:
    """Codes are read, and weights written."""
    return copied(sum(own.codes.nbytes + 4 * own.codes.numel() for own in solved.values()))


def rows(clock: Clock) -> Iterator[dict[str, str]]:
    """A row for every part of both stages, their sums, and what is around them."""
    for stage in STAGES:
        for part in PARTS:
            if clock.seconds[stage, part]:
                yield row(clock, stage, part, [(stage, part)])
        yield row(clock, stage, "sum", [place for place in clock.seconds if place[0] == stage])
    yield row(clock, "both", "sum", [place for place in clock.seconds if place[0] in STAGES])
    for place in [place for place in clock.seconds if place[0] not in STAGES]:
        yield row(clock, *place, [place])


def row(clock: Clock, stage: str, part: str, places: list[Place]) -> dict[str, str]:
    """Seconds of some parts together, and of their work by itself."""
    seconds, floor = sum(clock.seconds[place] for place in places), sum(map(clock.floor, places))
    calls = "" if part in (REST, "sum") else str(sum(clock.calls[place] for place in places))
    return {
        "stage": stage, "part": part, "calls": calls, "seconds": f"{seconds:.2f}", "floor, seconds": f"{floor:.2f}" if floor else "",
        "times the floor": f"{seconds / floor:.2f}" if floor else "",
    }  # fmt: skip


def rates(clock: Clock) -> Iterator[dict[str, str]]:
    """What the products of the floors were measured at."""
    total: dict[Work, float] = {}
    for place, works in clock.work.items():
        for work, times in works.items():
            total[work] = total.get(work, 0.0) + times * (place[0] in STAGES)
    for work, times in sorted(total.items(), key=lambda item: -item[1] * clock.rate(item[0])):
        if work.flops and times:
            sizes = " x ".join(map(str, work.sizes))
            yield {"work": f"{work.kind} {sizes}", "how often": f"{times:.0f}", "ms": f"{1e3 * clock.rate(work):.3f}",
                   "Gflop/s": f"{work.flops / clock.rate(work) / 1e9:.1f}"}  # fmt: skip


if __name__ == "__main__":
    main()
