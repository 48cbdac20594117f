"""Tuning after solving: perplexity by solver, scope and calibration text, and AutoRound on the same windows beside it.

    python -m benchmarks.tuning --models text/llama-7m text/opt-7m --text text/brown.txt \\
        --evaluate text/reviews.txt text/wikitext2-test.txt [--peer .venv-peers/bin/python] [--out FILE]

Rows are by row of the weight, asymmetric, true-sequential; 128 windows of 128 tokens of the text are the data, and where
it says "+ self" as many windows more as it says that the model wrote itself. AutoRound gets the same windows and is
evaluated by the same code. Ratios are to full precision, with the 95% interval of a paired bootstrap over windows; one
seed, so that what differs between rows by less than the seeds do is not told apart. Seconds are those of solving and
tuning (of AutoRound: of its own), on a machine that may have done other things meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.measuring import about, flags, machine_line, report
from models.load import load_model
from quant.blocks.weights import BlockWeights
from quant.core import env
from quant.evaluate.passes import Variant
from quant.evaluate.perplexity import evaluate
from quant.evaluate.perplexity import report as entries
from quant.run.request import Request
from quant.run.scoring import FullPrecision
from quant.run.session import Session, open_session
from quant.tune.config import Tuning

SEQLEN, WINDOWS = 128, 128
BEST: dict[str, Any] = {"range": "mse", "options": {"search_grid": True, "refit_grid": True}}
SOLVERS: dict[str, dict[str, Any]] = {
    "rtn": {"solver": "rtn"},
    "gptq": {"solver": "gptq"},
    "quantease": {"solver": "quantease"},
    "quantease, preset best": {"solver": "quantease", **BEST},
}
PEER = Path(__file__).with_name("autoround.py")


@dataclass(frozen=True)
class Row:
    """One row of a model at a width: what solves, what is tuned (None: nothing), on how many windows of its own."""

    solver: str
    scope: str | None
    own: int
    norms: bool = False

    @property
    def label(self) -> str:
        """What the table says."""
        tuned = f" --tune {self.scope}{' --tune-norms' if self.norms else ''}" if self.scope else ""
        return self.solver + tuned


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a model at a width."""
    for solver in args.solvers:
        yield Row(solver, None, 0)
        for own in dict.fromkeys((0, args.own)):
            for scope in args.tune:
                yield Row(solver, scope, own)


def main() -> None:
    """Measure row by row."""
    parser = flags(__doc__, "cpu")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration")
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--tune", nargs="*", default=["block", "model"], choices=("block", "model"))
    parser.add_argument("--own", type=int, default=896, help="windows that the model writes (0: no such rows)")
    parser.add_argument("--iterations", type=int, default=0, help="of tuning (default: --tune's own)")
    parser.add_argument("--limit", type=int, default=300, help="evaluation windows")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"), help="where finished rows are kept")
    parser.add_argument("--peer", type=Path, help="Python of an environment with auto-round")
    args = parser.parse_args()
    about_it = f"{args.text.name}; {machine_line(env.describe(env.pick_device(args.device)), env.versions())}"
    head = ["# Tuning after solving", "", about(__doc__), "", f"Calibration {about_it}.", ""]
    report(head, records_of(args), args.out)


def records_of(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Every row of every model at every width; AutoRound's behind ours."""
    for model in args.models:
        full = FullPrecision()
        session = open_session(request_of(args, model, args.bits[0], Row("rtn", None, 0)))
        for bits in args.bits:
            start = {"model": Path(model).name, "bits": str(bits)}
            for row in rows_of(args):
                request = request_of(args, model, bits, row)
                results = session.run_all([(request.run, request.output)], kept=full)[0]
                seconds = sum(results["seconds"][stage] for stage in ("forward", "gram", "solve", "learn"))
                figures = cells(results["perplexity"], results["fidelity"])
                yield start | {
                    "method": row.label,
                    "windows": windows(args, row),
                    **figures,
                    "seconds": f"{seconds:.0f}",
                }
            for own in dict.fromkeys((0, args.own)) if args.peer else ():
                row = Row("autoround, 200 steps a block", None, own)
                figures = peer_figures(args, session, model, bits, row)
                yield start | {"method": row.label, "windows": windows(args, row), **figures}


def windows(args: argparse.Namespace, row: Row) -> str:
    """What a row is calibrated on."""
    return f"{WINDOWS}" + (f" + {row.own} self" if row.own else "")


def request_of(args: argparse.Namespace, model: str, bits: int, row: Row) -> Request:
    """The request of one row; its directory is named by what it is."""
    dataset = str(args.text) + (f"+self:{row.own}" if row.own else "")
    tuning = Tuning(row.scope, args.iterations, norms=row.norms) if row.scope else None
    return Request.of(
        model, dataset=dataset, nsamples=WINDOWS, seqlen=SEQLEN, wbits=bits, true_sequential=True, tuning=tuning,
        eval_datasets=tuple(args.evaluate), limit=args.limit, device=args.device, dtype="float32", calib_batch=16,
        runs=args.runs, **SOLVERS.get(row.solver, {}),
    )  # fmt: skip


def cells(perplexity: dict[str, Any], fidelity: dict[str, Any]) -> dict[str, str]:
    """Figures of every corpus."""
    columns: dict[str, str] = {}
    for name, entry in perplexity.items():
        before, after, (low, high) = entry["fp"], entry["quantized"], entry["ratio_ci95"]
        columns |= {f"{name}: ppl before": f"{before:.2f}", f"{name}: after": f"{after:.2f}"}
        columns |= {f"{name}: ratio": f"{after / before:.4f} ({low:.4f}-{high:.4f})"}
        columns |= {f"{name}: KL": f"{fidelity[name]['kl_divergence']:.4f}"}
    return columns


def peer_figures(args: argparse.Namespace, session: Session, model: str, bits: int, row: Row) -> dict[str, str]:
    """AutoRound's weights on our evaluation."""
    tokens = session.calibration(request_of(args, model, bits, row).run)
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / "tokens.safetensors", Path(name) / "out"
        save_file({"ids": tokens.ids}, file)
        command = [str(args.peer), str(PEER), model, str(file), str(out), str(bits), "200"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        other = load_model(str(out), dtype=session.model.dtype, cache_dir=out)
        variant = Variant(lambda index, weights: BlockWeights.read(other, index, session.device))
        scores = evaluate(session.model, session.evaluation, {"peer": variant}, device=session.device, batch=16)
    figures = entries(session.evaluation, scores, "peer")
    said = json.loads(done.stdout.splitlines()[-1])
    return cells(figures["perplexity"], figures["fidelity"]) | {"seconds": f"{said['seconds']:.0f}"}


if __name__ == "__main__":
    main()
