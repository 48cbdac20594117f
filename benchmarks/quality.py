"""Quality at equal bits: every part alone, all together, and all but one; AutoRound on the same windows beside it.

    python -m benchmarks.quality --models text/llama-small text/opt-small --text text/brown.txt \\
        --evaluate text/reviews.txt text/wikitext2-test.txt text/ptb-test.txt [--peer .venv-peers/bin/python] [--out FILE]

Rows are by row of the weight (or in groups of --group-size), asymmetric, true-sequential, with the flags of
model_quantizer.py that the table names; 128 windows of 128 tokens of the text (--windows, --seqlen) are the data, and where it
says "+ self" as many windows more as it says that the model wrote itself. AutoRound gets the same windows and is evaluated by the same code. Ratios are to full precision, with the 95%
interval of a paired bootstrap over windows; one seed, so that what differs between rows by less than the seeds do is not
told apart. Bits are the stored ones. Seconds are those of solving and tuning (of AutoRound: of its own); memory is the peak of the process, evaluation
included (of AutoRound: of its own).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.measuring import about, flags, machine_line, report
from model_quantizer import request_from
from models.load import load_model
from quant.blocks.weights import BlockWeights
from quant.core import env
from quant.core.errors import InputError
from quant.core.names import BLOCK_STAGES
from quant.evaluate.passes import Variant
from quant.evaluate.perplexity import evaluate
from quant.evaluate.perplexity import report as entries
from quant.export.read import open_checkpoint
from quant.run.request import Request
from quant.run.scoring import FullPrecision
from quant.run.session import Session, open_session

SEARCHED = "--quantization-method quantease --range mse --search-grid --refit-grid"
CORRECTED = "--target-correction 1 --residual-correction"
TUNED = "--tune model --tune-norms"
BEST = f"{SEARCHED} {CORRECTED} {TUNED}"  # the flags of --preset best, whatever fits in memory
EXTRAS = {  # parts that no preset has
    "token weights": "--saliency 4",
    "column scales": "--column-scales",
    "real minimum": "--grid real",
    "fractional zeros": "--grid fractional",
    "bias correction": "--bias-correction",
}
PARTS = {  # of the ablation: each alone on plain quantease, and all but each
    "searched grids": "--range mse --search-grid",
    "refitted grids": "--refit-grid",
    "fractional zeros": "--grid fractional",
    "token weights": "--saliency 4",
    "corrected target": "--target-correction 1 --residual-correction",
    "tuning": "--tune model --tune-norms",
}
PLAIN = {name: f"--quantization-method {name}" for name in ("rtn", "gptq", "gptaq", "qronos", "quantease")}
PEER = "autoround, its own code"
GPTQMODEL = "gptq, GPTQModel's own code"  # symmetric grids, as it makes them: give --more --sym to the others


@dataclass(frozen=True)
class Row:
    """One row: what the table calls it, the flags, and how many windows the model writes itself."""

    label: str
    words: str
    own: int = 0


def rows_of(own: int) -> Iterator[Row]:
    """The rows of a model at a width; those with ``own`` windows too, where there are any."""
    for name, words in PLAIN.items():
        yield Row(name, words)
    yield Row("searched quantease", SEARCHED)
    for name, words in EXTRAS.items():
        yield Row(f"searched quantease + {name}", f"{SEARCHED} {words}")
    yield Row("searched quantease + tuned", f"{SEARCHED} {TUNED}")
    yield Row("preset balanced", f"{SEARCHED} {CORRECTED}")
    yield Row("preset balanced + tuned block by block", f"{SEARCHED} {CORRECTED} --tune block --tune-norms")
    yield Row("preset best", BEST)
    yield Row(PEER, "")
    yield Row(GPTQMODEL, "")
    if own:
        yield Row("searched quantease", SEARCHED, own)
        yield Row("searched quantease + tuned", f"{SEARCHED} {TUNED}", own)
        yield Row("preset balanced", f"{SEARCHED} {CORRECTED}", own)
        yield Row("preset best", BEST, own)
        for name, words in EXTRAS.items():
            yield Row(f"preset best + {name}", f"{BEST} {words}", own)
        yield Row(PEER, "", own)
        yield Row("preset best, 700 steps", f"{BEST} --tune-iterations 700", 2 * own + 256)
        for steps, times in ((700, 2), (1400, 4)):
            words = f"{BEST} --saliency 4 --grid fractional --tune-iterations {steps}"
            yield Row(f"preset best + fractional zeros + token weights, {steps} steps", words, times * (own + 128))


def ablation(own: int) -> Iterator[Row]:
    """Plain quantease with every part alone, everything, and everything but each; ``own`` windows that the model writes are
    a part, too."""
    plain, text = PLAIN["quantease"], "self-written text"
    everything = " ".join((plain, *PARTS.values()))
    yield Row("quantease", plain)
    for name, words in PARTS.items():
        yield Row(f"quantease + {name}", f"{plain} {words}")
    yield Row(f"quantease + {text}", plain, own)
    yield Row("everything", everything, own)
    for left_out in PARTS:
        kept = (words for name, words in PARTS.items() if name != left_out)
        yield Row(f"everything but {left_out}", " ".join((plain, *kept)), own)
    yield Row(f"everything but {text}", everything)


def main() -> None:
    """Measure row by row."""
    parser = flags(__doc__, "cpu")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration")
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--ablation", action="store_true", help="rows that add and take out one part at a time")
    parser.add_argument("--rows", nargs="+", help="only rows of these names")
    parser.add_argument("--more", default="", help="flags of model_quantizer.py that every row gets besides")
    parser.add_argument("--own", type=int, default=896, help="windows that the model writes (0: no such rows)")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=-1, help="columns that share a scale")
    parser.add_argument("--peer-steps", type=int, default=200, help="steps a block of AutoRound")
    parser.add_argument("--limit", type=int, default=300, help="evaluation windows")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where finished rows are kept")
    parser.add_argument("--peer", type=Path, help="Python of an environment with auto-round")
    parser.add_argument("--gptqmodel", type=Path, help="Python of an environment with gptqmodel")
    args = parser.parse_args()
    about_it = f"{args.text.name}; {machine_line(env.describe(env.pick_device(args.device)), env.versions())}"
    head = ["# Quality at equal bits", "", about(__doc__), "", f"Calibration {about_it}.", ""]
    report(head, records_of(args), args.out)


def records_of(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Every row of every model at every width."""
    rows = ablation if args.ablation else rows_of
    chosen = [row for row in rows(args.own) if not args.rows or row.label in args.rows]
    for model in args.models:
        session, full = open_session(request_of(args, model, args.bits[0], Row("rtn", PLAIN["rtn"]))), FullPrecision()
        for bits in args.bits:
            for row in chosen:
                start = {"model": Path(model).name, "bits": str(bits), "method": row.label}
                start["windows"] = f"{args.windows}" + (f" + {row.own} self" if row.own else "")
                if row.label in (PEER, GPTQMODEL):
                    if args.peer if row.label == PEER else args.gptqmodel:
                        yield start | peer_figures(args, session, model, bits, row)
                    continue
                try:
                    request = request_of(args, model, bits, row)
                    results = session.run_all([(request.run, request.output)], kept=full)[0]
                except InputError as error:  # a row that this model cannot have; the others are measured all the same
                    sys.stderr.write(f"{model} {row.label}: {error}\n")
                    continue
                seconds = sum(results["seconds"].get(stage, 0.0) for stage in BLOCK_STAGES)
                figures = cells(results["perplexity"], results["fidelity"])
                stored = {"stored": f"{results['bits_per_weight']:.3f}"}
                memory = f"{results['peak_bytes']['host'] / 1e9:.2f}"
                yield start | stored | figures | {"seconds": f"{seconds:.0f}", "GB": memory}


def request_of(args: argparse.Namespace, model: str, bits: int, row: Row) -> Request:
    """The request of one row."""
    dataset = str(args.text) + (f"+self:{row.own}" if row.own else "")
    fixed = {
        "model": model, "dataset": dataset, "nsamples": args.windows, "seqlen": args.seqlen, "wbits": bits,
        "eval-datasets": ",".join(args.evaluate), "limit": args.limit, "device": args.device, "dtype": "float32",
        "calib-batch": 16, "group-size": args.group_size,
    }  # fmt: skip
    words = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
    request: Request = request_from([*words, "--true-sequential", *row.words.split(), *args.more.split()])
    return request.but(runs=args.runs)


def cells(perplexity: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, str]:
    """Figures of every corpus."""
    columns: dict[str, str] = {}
    for name, entry in perplexity.items():
        before, after, (low, high) = entry["fp"], entry["quantized"], entry["ratio_ci95"]
        columns[f"{name}: ppl"] = f"{before:.2f} → {after:.2f}"
        columns[f"{name}: ratio"] = f"{after / before:.4f} ({low:.4f}-{high:.4f})"
        columns[f"{name}: KL"] = f"{fidelity[name]['kl_divergence']:.4f}"
    return columns


def peer_figures(args: argparse.Namespace, session: Session, model: str, bits: int, row: Row) -> dict[str, str]:
    """Another software's weights on our evaluation."""
    tokens = session.calibration(request_of(args, model, bits, Row("", PLAIN["rtn"], row.own)).run)
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / "tokens.safetensors", Path(name) / "out"
        save_file({"ids": tokens.ids}, file)
        script, python, numbers = "autoround.py", args.peer, (bits, args.peer_steps, args.group_size)
        if row.label == GPTQMODEL:
            script, python, numbers = "gptqmodel_peer.py", args.gptqmodel, (bits, args.group_size)
        command = [str(python), str(Path(__file__).with_name(script)), model, str(file), str(out), *map(str, numbers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        other = load_model(str(out), dtype=session.model.dtype, cache_dir=out, opener=open_checkpoint)
        variant = Variant(lambda index, weights: BlockWeights.read(other, index, session.device))
        scores = evaluate(session.model, session.evaluation, {"peer": variant}, device=session.device, batch=16)
    figures = entries(session.evaluation, scores, "peer")
    said = json.loads(done.stdout.splitlines()[-1])
    shapes = (
        session.model.linear_shapes().values()
    )  # a scale of 16 bits for every group, and a zero point where there is one
    groups = sum(out * (1 if args.group_size == -1 else n_in // args.group_size) for out, n_in in shapes)
    zero = bits if row.label == PEER else 0
    stored = bits + (16 + zero) * groups / sum(out * n_in for out, n_in in shapes)
    seconds = {"stored": f"{stored:.3f}", **cells(figures["perplexity"], figures["fidelity"])}
    return seconds | {"seconds": f"{said['seconds']:.0f}", "GB": f"{said['peak_bytes'] / 1e9:.2f}"}


if __name__ == "__main__":
    main()
