"""GGUF's own types of blocks: llama.cpp's rounding beside solvers that work on the same grid, at equal size.

    python -m benchmarks.superblocks --models text/llama-7m --text text/brown.txt --evaluate text/wikitext2-test.txt \\
        text/ptb-test.txt --llama-cpp .venv-llama/bin/python [--grids q2_k q3_k q4_k] [--out FILE]

Every linear of the blocks has the type (where its rows are no whole super-blocks the one that llama.cpp's quantizer takes instead),
everything else stays, and all rows take the same bits. llama.cpp's rows are its own
quantizer (ggml, through xllamacpp): without data, and with an importance matrix, the mean squares of the inputs on the same
windows that our rows calibrate on. All are evaluated by the same code. Ratios are to full precision, with the 95% interval of a paired bootstrap
over windows; one seed. Seconds are those of solving (of llama.cpp: of rounding), on the threads that the line below says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measuring import about, flags, machine_line, report
from benchmarks.quality import cells
from model_quantizer import request_from
from quant.blocks.weights import BlockWeights
from quant.cli.presets import own_sizes
from quant.core import env
from quant.core.names import ACT_GRIDS, BLOCK_STAGES, LEVEL_GRIDS, SUPER_GRIDS
from quant.core.types import QuantSpec
from quant.evaluate.passes import Variant
from quant.evaluate.perplexity import evaluate
from quant.evaluate.perplexity import report as entries
from quant.export.gguf_types import type_for
from quant.run.request import Request
from quant.run.scoring import FullPrecision
from quant.run.session import Session, open_session

GRIDS = [*SUPER_GRIDS, *LEVEL_GRIDS]
ROWS = {
    "rtn": "--quantization-method rtn",
    "rtn, searched": "--quantization-method rtn --range mse",
    "gptq, searched": "--quantization-method gptq --range mse --true-sequential",
    "quantease, searched": "--quantization-method quantease --range mse --true-sequential",
    "preset fast": "--preset fast",
    "preset balanced": "--preset balanced",
}
PEER, PEER_WITH_DATA = "llama.cpp", "llama.cpp, importance matrix"


def main() -> None:
    """Measure row by row."""
    parser = flags(__doc__, "cpu")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration")
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--grids", nargs="+", default=list(SUPER_GRIDS), choices=GRIDS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="of ours")
    parser.add_argument("--inputs", action="store_true", help="also with the inputs of linears in the same floats")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window")
    parser.add_argument("--limit", type=int, default=300, help="evaluation windows")
    parser.add_argument("--runs", type=Path, default=Path("runs/superblocks"), help="where finished rows are kept")
    parser.add_argument("--llama-cpp", type=Path, help="Python of an environment with xllamacpp")
    args = parser.parse_args()
    about_it = f"{args.text.name}; {machine_line(env.describe(env.pick_device(args.device)), env.versions())}"
    head = ["# On the grids of GGUF's blocks", "", about(__doc__), "", f"Calibration {about_it}.", ""]
    report(head, records_of(args), args.out)


def request_of(args: argparse.Namespace, model: str, grid: str, words: str) -> Request:
    """The request of one row."""
    fixed = {
        "model": model, "dataset": args.text, "nsamples": args.windows, "seqlen": args.seqlen, "grid": grid,
        "eval-datasets": ",".join(args.evaluate), "limit": args.limit, "device": args.device, "dtype": "float32",
        "calib-batch": 16,
    }  # fmt: skip
    given = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
    request: Request = request_from([*given, *words.split()])
    return request.but(runs=args.runs)


def records_of(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Every row of every grid of every model."""
    for model in args.models:
        first = request_of(args, model, args.grids[0], ROWS["rtn"])
        session, full = open_session(first), FullPrecision()
        importance = mean_squares(model, session.calibration(first.run).ids)
        for grid in args.grids:
            start = {"model": Path(model).name, "grid": grid}
            if args.llama_cpp and grid not in ACT_GRIDS:
                yield start | peer_row(args, session, grid, PEER, None)
                yield start | peer_row(args, session, grid, PEER_WITH_DATA, importance)
            rows = {label: words for label, words in ROWS.items() if label in args.rows}
            if args.inputs and grid in ACT_GRIDS:
                rows |= {f"{label}, inputs too": f"{words} --act-grid {grid}" for label, words in rows.items()}
            for label, words in rows.items():
                request = request_of(args, model, grid, words)
                results = session.run_all([(request.run, request.output)], kept=full)[0]
                seconds = sum(results["seconds"].get(stage, 0.0) for stage in BLOCK_STAGES)
                bits = {"method": label, "stored": f"{results['bits_per_weight']:.4g}"}
                yield start | bits | cells(results["perplexity"], results["fidelity"]) | {"seconds": f"{seconds:.1f}"}


def mean_squares(model: str, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean squared inputs, float32 [in], of every linear by name, of the model as transformers computes it."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, given: tuple, output: object) -> None:
            square = given[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(square)) + square

        return hook

    for name, module in lm.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(name))
    with torch.inference_mode():
        for part in ids.split(16):
            lm(part)
    return {name: (square / ids.numel()).float().numpy() for name, square in sums.items()}


def peer_row(
    args: argparse.Namespace, session: Session, grid: str, label: str, importance: dict[str, np.ndarray] | None
) -> dict[str, str]:
    """llama.cpp's weights on our evaluation."""
    model, bits, part = session.model, *own_sizes(grid)
    asked = QuantSpec(bits, part, kind=grid)
    linears, weights, kinds = tuple(model.linear_shapes()), {}, {}
    for index in range(len(model.blocks)):
        own = model.block_weights(index, torch.device("cpu"))
        for name in linears:
            full, weight = f"{model.family.blocks}.{index}.{name}", own[f"{name}.weight"].float().numpy()
            weights[full] = weight
            kinds[full] = type_for(asked.for_inputs(weight.shape[1]), weight.shape[1]).type
    with tempfile.TemporaryDirectory() as folder:
        types, given, data, out = (Path(folder) / n for n in ("types.json", "weights.npz", "importance.npz", "out.npz"))
        types.write_text(json.dumps({name: kind.value for name, kind in kinds.items()}))
        np.savez(given, **weights)
        if importance is not None:
            np.savez(data, **{name: importance[name] for name in weights})
        words = [types, given, "-" if importance is None else data, out]
        script = Path(__file__).with_name("ggml_rounding.py")
        done = subprocess.run([args.llama_cpp, script, *words], capture_output=True, text=True, check=True)
        blocks = dict(np.load(out))
    values = {name: torch.from_numpy(gguf.dequantize(data, kinds[name])) for name, data in blocks.items()}

    def deployed(index: int, own: BlockWeights) -> BlockWeights:
        prefix = f"{model.family.blocks}.{index}."
        return own.with_parameters({f"{name}.weight": values[prefix + name] for name in linears})

    scores = evaluate(model, session.evaluation, {"peer": Variant(deployed)}, device=session.device, batch=16)
    figures = entries(session.evaluation, scores, "peer")
    bits = 8 * sum(data.nbytes for data in blocks.values()) / sum(weight.size for weight in weights.values())
    said = json.loads(done.stdout.splitlines()[-1])
    scored = cells(figures["perplexity"], figures["fidelity"])
    return {"method": label, "stored": f"{bits:.4g}"} | scored | {"seconds": f"{said['seconds']:.1f}"}


if __name__ == "__main__":
    main()
