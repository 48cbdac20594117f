"""One run's codes in every format: size, perplexity and speed, by this toolkit and by the software each is for.

    python -m benchmarks.formats --runs RUN [RUN ...] --text text/wikitext2-test.txt --llama-cpp .venv-llama/bin/python \\
        --mlx .venv-mlx/bin/python --peer .venv-peers/bin/python [--out FILE]

A run directory is converted to each format that holds its grid (the others are left out), and read again. ours: perplexity of
the checkpoint as `python -m quant evaluate` computes it, of a GGUF file or MLX directory that of the run. theirs: of the same
windows (--windows of --seqlen tokens), by llama.cpp through xllamacpp token by token, mlx-lm on its CPU, or transformers
with what reads the format. Tokens a second: a prompt of --seqlen tokens, and as many tokens behind one, best of three (mlx-lm
and ours: of two); all on --threads threads in one call; ours are those of packed products, once for a run. bits: of a linear's weight,
as the file holds it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measuring import about, flags, machine_line, report
from data.calibration import evaluation_tokens
from models.load import load_tokenizer
from quant.blocks.instrument import instrument
from quant.core import env
from quant.core.errors import InputError
from quant.core.names import FORMATS, GGUF, MLX
from quant.export import PACKED
from quant.export.read import QuantizedCheckpoint
from quant.export.target import size_on_disk
from quant.run.convert import convert
from quant.run.generate import Clock, generate
from quant.run.packed_model import Resident, load_resident, open_quantized

HERE = Path(__file__).parent
SCRIPTS = {GGUF: "llama_cpp.py", MLX: "mlx_peer.py"}  # the others' is peer.py
CPU = torch.device("cpu")


def main() -> None:
    """Every format of every run."""
    parser = flags(__doc__, "cpu")
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="run directories")
    parser.add_argument("--text", required=True, help="what perplexity is of")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="Python of an environment with xllamacpp")
    parser.add_argument("--mlx", type=Path, help="Python of an environment with mlx-lm")
    parser.add_argument(
        "--peer", type=Path, help="Python of an environment with compressed-tensors, optimum and gptqmodel"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    words = f"{Path(args.text).name}; {machine_line(env.describe(CPU), env.versions())}"
    head = ["# One run in every format", "", about(__doc__), "", f"Windows of {words}.", ""]
    with tempfile.TemporaryDirectory() as directory:
        report(head, records(args, Path(directory)), args.out)


def records(args: argparse.Namespace, base: Path) -> Iterator[dict[str, str]]:
    """A row for every format that holds a run."""
    for run in args.runs:
        quantized = open_quantized(str(run), base / "cache")
        tokenizer = load_tokenizer(quantized.model.checkpoint.path)
        windows = evaluation_tokens(args.text, tokenizer, seqlen=args.seqlen, limit=args.windows).ids.tolist()
        resident = load_resident(quantized, CPU)
        own, rates = perplexity(resident, windows), speed(resident, windows[0])
        start = {"run": run.name}
        yield start | {"format": "the run itself"} | figures(None, None, own, rates)
        for name in args.formats:
            place = base / f"{run.name}-{name}"
            try:
                convert(run, name, place, cache_dir=base / "cache")
            except InputError as error:
                yield start | {"format": name, "theirs": str(error).split(": use", maxsplit=1)[0]}
                continue
            ours = own
            if name != MLX:
                ours = perplexity(load_resident(open_quantized(str(place), base / "cache"), CPU), windows)
            theirs = ask(args, name, place, windows)
            yield start | {"format": name} | figures(place, theirs, ours, None)


def perplexity(resident: Resident, windows: list[list[int]]) -> float:
    """Of a model in memory, its packed products included."""
    total, count = 0.0, 0
    with torch.inference_mode(), instrument(resident.blocks, resident.weights, resident.act):
        for window in torch.tensor(windows).split(1):
            logits = resident.module(window, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= float(logits.gather(1, window[0, 1:, None]).sum())
            count += window.shape[1] - 1
    return math.exp(total / count)


def speed(resident: Resident, window: list[int]) -> tuple[float, float]:
    """Tokens a second of reading a window, and of writing as many behind its first."""
    n, best = len(window), [math.inf, math.inf]
    for _ in range(2):
        for place, (prompt, steps) in enumerate(((window, 1), (window[:1], n))):
            started = time.perf_counter()
            for _ in generate(resident, torch.tensor([prompt]), steps, clock=Clock()):
                pass
            best[place] = min(best[place], time.perf_counter() - started)
    return n / best[0], n / best[1]


def ask(args: argparse.Namespace, name: str, place: Path, windows: list[list[int]]) -> dict | str | None:
    """What the software that a format is for says of the windows; why it says nothing; None where nobody is asked."""
    python = {GGUF: args.llama_cpp, MLX: args.mlx}.get(name, None if name == "bitplane" else args.peer)
    if python is None:
        return None
    file = next(place.glob("*.gguf")) if name == GGUF else place
    jobs, out = place.with_name("jobs.json"), place.with_name("told.json")
    out.unlink(missing_ok=True)
    jobs.write_text(json.dumps([[str(file), windows, args.threads, str(out)]]))
    command = [str(python.absolute()), str(HERE / SCRIPTS.get(name, "peer.py")), "score", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        return ([line for line in done.stderr.splitlines() if line.strip()] or ["no answer"])[-1][:160]
    told: dict = json.loads(out.read_text())
    return told


def figures(
    place: Path | None, theirs: dict | str | None, own: float, rates: tuple[float, float] | None
) -> dict[str, str]:
    """The cells of a row."""
    row = {
        "bits": bits_of(place),
        "MB": "" if place is None else f"{size_on_disk(place) / 1e6:.1f}",
        "ours": f"{own:.3f}",
    }
    row |= {"theirs": "", "theirs / ours": "", "prompt, tokens/s": "", "decode, tokens/s": ""}
    if isinstance(theirs, str):
        return row | {"theirs": theirs}
    if theirs is not None:
        losses = [-logprob for window in theirs["logprobs"] for logprob in window]
        told = math.exp(math.fsum(losses) / len(losses))
        row |= {"theirs": f"{told:.3f}", "theirs / ours": f"{told / own:.4f}"}
        rates = theirs["prompt"], theirs["decode"]
    if rates is not None:
        row |= {"prompt, tokens/s": f"{rates[0]:.1f}", "decode, tokens/s": f"{rates[1]:.1f}"}
    return row


def bits_of(place: Path | None) -> str:
    """Stored bits of a weight in the linears of a packed checkpoint."""
    if place is None or not (place / "config.json").is_file():
        return ""
    declared = json.loads((place / "config.json").read_text())
    if declared.get("quantization_config", {}).get("quant_method") not in PACKED:
        return ""
    checkpoint = QuantizedCheckpoint(place)
    weights = [checkpoint.quantized(f"{linear}.weight") for linear in checkpoint.linears]
    return f"{sum(w.storage_bits() for w in weights) / sum(w.codes.numel() for w in weights):.3f}"


if __name__ == "__main__":
    main()
